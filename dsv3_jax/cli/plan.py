"""`dsv3 plan`."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv3_jax.cli.options import parse
from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import UserError

if TYPE_CHECKING:
    from dsv3_jax.planning.plan import Plan

_DESCRIPTION = """Memory, traffic, time and cost of a run on a cluster, before it is started.

On paper in milliseconds; with --compile the real training step is compiled for the cluster, which need not be there,
and the compiler's own figures are put beside the paper's. Targets: h100:N, h200:N, h800:N, v5p:N (or v5p:16x16x8),
v6e:N, local. Axes of --mesh: stage, data, fsdp, expert, tensor; one may be -1 (the rest of the devices).

Examples:
  dsv3 plan --preset v3-671b --target h800:2048 --mesh stage=16,expert=64,data=2 --precision fp8 --batch-size 15360
  ... --layout report      the same on paper as the report ran it, with weights and activations laid out as it says
  dsv3 plan --preset v3-671b --target h200:2048 --mesh fsdp=32,expert=64 --compile --out plans/h200
  dsv3 plan --preset ablation-16b --target h100:64 --search 10
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Options of `dsv3 plan`.

    Attributes:
      preset: the model.
      target: the cluster: h200:2048, v5p:16x16x8, local ...
      mesh: sizes of its axes, such as stage=16,expert=64,data=2.
      sequence_length: tokens a sequence; 0: 4096, or the model's longest if that is less.
      batch_size: sequences a step over the whole cluster; 0: one micro-batch a rank.
      micro_batch_size: sequences a forward pass on each rank.
      precision: float32, bfloat16 or fp8.
      rematerialisation: none, report, products or full.
      gradient_dtype: of accumulated gradients: float32 or bfloat16.
      moment_dtype: of Adam's moments: float32, bfloat16, or recipe for what the precision names.
      zero: divide optimizer state over replicas (ZeRO-1).
      average: running average of the weights: host, device or none.
      schedule: of the pipeline: dualpipe, zb1p or 1f1b.
      layout: of the figures on paper: step, this project's training step, or with stages report, the report's own run.
      tokens: of the whole run, such as 14.8e12.
      compile: compile the real training step for the target and compare.
      search: rank this many mesh shapes on paper; with --compile the best are compiled and ranked again.
      json: print JSON instead of tables.
      out: folder for plan.json, plan.txt and plan.png.
    """

    preset: str = "v3-671b"
    target: str = "h200:2048"
    mesh: str = ""
    sequence_length: int = 0
    batch_size: int = 0
    micro_batch_size: int = 1
    precision: str = "bfloat16"
    rematerialisation: str = "report"
    gradient_dtype: str = "float32"
    moment_dtype: str = "recipe"
    zero: bool = True
    average: str = "host"
    schedule: str = "dualpipe"
    layout: str = "step"
    tokens: float = 14.8e12
    compile: bool = False
    search: int = 0
    json: bool = False
    out: str = ""


def main(argv: list[str]) -> int:
    """Parses, plans, and returns the exit code."""
    options = parse(PlanOptions, argv, prog="dsv3 plan", description=_DESCRIPTION, default=PlanOptions())
    if options.search < 0:
        raise UserError(f"--search takes how many meshes to show, such as 10, not {options.search}")
    if options.search:
        return _search(options)
    from dsv3_jax.planning.config import PlanConfig
    from dsv3_jax.planning.plan import make_plan
    from dsv3_jax.sharding.mesh import MeshConfig

    mesh = MeshConfig.parse(options.mesh) if options.mesh else MeshConfig(fsdp=-1)
    config = PlanConfig(mesh=mesh, **_run(options))
    plan = make_plan(config)
    compiled = None
    if options.compile:
        from dsv3_jax.planning.compiled import compile_plan

        compiled = compile_plan(config)
    _deliver(plan, compiled, options)
    return 0


def _run(options: PlanOptions) -> dict[str, Any]:
    """All fields of a plan's configuration but the mesh."""
    from dsv3_jax.planning.config import PlanConfig
    from dsv3_jax.planning.hardware import Target

    model = ModelConfig.preset(options.preset)
    fields = {field.name for field in dataclasses.fields(PlanConfig)}
    same = {name: value for name, value in vars(options).items() if name in fields}
    changed = {
        "model": model,
        "target": Target.parse(options.target),
        "sequence_length": options.sequence_length or min(4096, model.max_position_embeddings),
    }
    return {name: value for name, value in (same | changed).items() if name != "mesh"}


def _deliver(plan: Plan, compiled: Any, options: PlanOptions) -> None:
    from rich.console import Console

    from dsv3_jax.planning.plan import plan_as_dict
    from dsv3_jax.planning.report_table import show

    values = plan_as_dict(plan)
    if compiled is not None:
        values["compiled"] = compiled.as_dict()
    text = json.dumps(values, indent=1)
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 110)
    if options.json:
        print(text)
    else:
        show(plan, console, compiled)
    if options.out:
        from dsv3_jax.planning.picture import draw_plan

        folder = _folder(options.out)
        (folder / "plan.json").write_text(text + "\n")
        with (folder / "plan.txt").open("w") as file:
            show(plan, Console(file=file, width=110), compiled)
        draw_plan(plan, folder / "plan.png")


def _folder(name: str) -> Path:
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {name}: {error.strerror}; name a folder that can be written") from None
    return folder


def _search(options: PlanOptions) -> int:
    from rich.console import Console

    from dsv3_jax.planning.search import search, search_as_dict, show_search

    if options.mesh:
        raise UserError("--search chooses the mesh itself: leave out --mesh")
    found = search(
        count=options.search,
        compile_best=options.compile,
        say=lambda line: print(line, file=sys.stderr, flush=True),
        **_run(options),
    )
    if not found:
        raise UserError(f"no mesh of {options.target} divides this model and batch; change --target or --batch-size")
    text = json.dumps(search_as_dict(found), indent=1)
    if options.json:
        print(text)
    else:
        show_search(found, Console(width=None if sys.stdout.isatty() else 130))
    if options.out:
        (_folder(options.out) / "search.json").write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
