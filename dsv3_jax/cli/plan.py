"""`dsv3 plan`."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dsv3_jax.bounds import LARGEST_COUNT, check_bounds
from dsv3_jax.cli.options import parse
from dsv3_jax.errors import UserError
from dsv3_jax.modules.attention_core import AttentionChoice
from dsv3_jax.modules.rematerialisation import Rematerialisation

if TYPE_CHECKING:
    from dsv3_jax.planning.plan import Plan

_DESCRIPTION = """Memory, traffic, time and cost of a training run on a cluster, before it is started.

A plan takes a few seconds. With --compile the real training step is also compiled for the cluster, which need not
exist, and the compiler's figures are printed beside the plan's. Targets: h100:N, h200:N, h800:N, v5p:N (or
v5p:16x16x8), v6e:N, local. Axes of --mesh: stage, data, fsdp, expert, tensor; one may be -1 (the rest of the devices).

An option that is not given has the value that `dsv3 train` uses for the preset. Where that batch does not divide over
the mesh, the plan takes the smallest that does. Without --mesh the plan is of the best mesh that --search finds.

Examples:
  dsv3 plan --target h800:2048 --mesh stage=16,expert=64,data=2 --precision fp8 --batch-size 15360 --average none
  dsv3 plan --preset v3-671b --target h200:2048 --mesh fsdp=32,expert=64 --compile --out plans/h200
  dsv3 plan --preset ablation-16b --target h100:64 --search 10
  dsv3 plan --target h800:512 --mesh fsdp=8,expert=64 --batch-size 512 --sequence-length 8192 --average none --grpo 512
  dsv3 plan --serve decode --target h800:320
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Options of `dsv3 plan`.

    Attributes:
      preset: name of the model, such as v3-671b.
      target: the cluster: h200:2048, v5p:16x16x8, local ...
      mesh: sizes of the mesh axes, such as stage=16,expert=64,data=2; the best mesh of --search unless given.
      sequence_length: tokens per sequence; 0 for the preset's.
      batch_size: sequences per step over the whole cluster; 0 for the fewest that keep the mesh busy.
      micro_batch_size: sequences per forward pass on each rank; 0 for all of the rank's.
      precision: float32, bfloat16, fp8 or auto, as for dsv3 train; auto is bfloat16 on GPUs and TPUs.
      rematerialisation: what the backward pass recomputes: none, report, products or full.
      attention: what computes attention: auto, scan or cudnn, as for dsv3 train.
      optimizer: adamw, or muon, which keeps one moment of most weights where AdamW keeps two.
      moment_dtype: dtype of the moments: float32, bfloat16, or recipe for what the precision names.
      zero: shard optimizer state over the replicas of its parameters (ZeRO-1).
      average: keep a running average of the weights: device, or none.
      schedule: pipeline schedule: dualpipe, zb1p or 1f1b.
      tokens: tokens of the whole run, such as 14.8e12.
      compile: compile the real training step for the target and compare.
      serve: plan a unit that reads prompts (prefill) or generates (decode) instead of training; --mesh tensor=N is
        the number of devices that share attention, --batch-size the tokens of prompts or the requests of a device, and
        --sequence-length the tokens of a prompt or the mean length of a request.
      search: rank this many mesh shapes; with --compile the best are compiled and ranked again.
      grpo: plan reinforcement learning by dsv3 grpo too, with an engine that writes this many sequences at a time; 0
        for training alone.
      grpo_reference: with --grpo, whether there is a reference (a KL weight above 0).
      json: print JSON instead of tables.
      out: folder for plan.json, plan.txt and plan.png.
    """

    preset: str = "v3-671b"
    target: str = "h200:2048"
    mesh: str = ""
    sequence_length: int = 0
    batch_size: int | None = None
    micro_batch_size: int | None = None
    precision: str | None = None
    rematerialisation: Rematerialisation | None = None
    attention: AttentionChoice | None = None
    optimizer: Literal["adamw", "muon"] | None = None
    moment_dtype: Literal["recipe", "float32", "bfloat16"] | None = None
    zero: bool = True
    average: Literal["device", "none"] | None = None
    schedule: Literal["dualpipe", "zb1p", "1f1b"] | None = None
    tokens: float = 14.8e12
    compile: bool = False
    serve: Literal["", "prefill", "decode"] = ""
    search: int = 0
    grpo: int = 0
    grpo_reference: bool = True
    json: bool = False
    out: str = ""

    def __post_init__(self) -> None:
        bounds = {
            "sequence_length": (0, 2**24),
            "search": (0, 10**4),
            "tokens": (1.0, 1e18),
            "grpo": (0, LARGEST_COUNT),
        }
        given = [name for name in ("batch_size", "micro_batch_size") if getattr(self, name) is not None]
        check_bounds(self, bounds | dict.fromkeys(given, (0, LARGEST_COUNT)), "--")


def main(argv: list[str]) -> int:
    """Parses, plans, and returns the exit code."""
    if any(word.split("=")[0] == "--layout" for word in argv):
        raise UserError(
            "--layout is gone: a plan is of this project's training step; the report's own run is calculated by "
            "`python experiments/report_run.py`"
        )
    options = parse(argv, prog="dsv3 plan", description=_DESCRIPTION, default=PlanOptions())
    if options.search and options.grpo:
        raise UserError("--grpo is planned for one mesh: leave out --search")
    if options.serve:
        return _serve(options)
    if options.search and options.mesh:
        raise UserError("--search chooses the mesh itself: leave out --mesh")
    if options.search:
        return _search(options)
    plan = _plan(options)
    compiled = None
    if options.compile:
        from dsv3_jax.planning.compiled import compile_plan

        compiled = compile_plan(plan.config)
    _deliver(plan, compiled, options)
    return 0


def _serve(options: PlanOptions) -> int:
    """Prints the plan of a unit that serves."""
    from dsv3_jax.config import ModelConfig
    from dsv3_jax.planning.hardware import Target
    from dsv3_jax.planning.serving_table import as_dict, lines, report_unit

    given = [f"--{name}" for name in ("compile", "search", "grpo") if getattr(options, name)]
    if given:
        raise UserError(f"{given[0]} is for plans of training: leave it out with --serve")
    name, _, tensor = options.mesh.partition("=")
    if options.mesh and (name != "tensor" or not tensor.isdecimal() or not int(tensor)):
        raise UserError(f"--mesh with --serve is tensor=N, the devices that share attention, not '{options.mesh}'")
    assert options.serve
    unit = report_unit(
        options.serve,
        ModelConfig.preset(options.preset),
        Target.parse(options.target),
        tensor=int(tensor or 4),
        batch=options.batch_size,
        context=options.sequence_length,
    )
    text = json.dumps(as_dict(unit), indent=1) if options.json else "\n".join(lines(unit))
    print(text)
    if options.out:
        file = _folder(options.out) / ("plan.json" if options.json else "plan.txt")
        file.write_text(text + "\n", encoding="utf-8")
    return 0


def _plan(options: PlanOptions) -> Plan:
    """Returns the plan on the mesh that is given, or on the best."""
    from dsv3_jax.planning.config import of_preset
    from dsv3_jax.planning.hardware import Target
    from dsv3_jax.planning.plan import make_plan
    from dsv3_jax.planning.search import search
    from dsv3_jax.sharding.mesh import MeshConfig
    from dsv3_jax.training.defaults import default_run

    target = Target.parse(options.target)
    if options.mesh:
        plan = make_plan(of_preset(options.preset, target, MeshConfig.parse(options.mesh), **_given(options)))
    else:
        plan = search(options.preset, target, 1, **_given(options))[0].plan
        print(f"--mesh is not given: the best that --search finds is {plan.config.mesh.written}", file=sys.stderr)
    batch, planned = default_run(options.preset).training.batch_size, plan.config.batch_size
    if options.batch_size is None and planned != batch:
        print(f"the preset's batch of {batch} does not divide over this mesh: planned with {planned}", file=sys.stderr)
    return plan


def _given(options: PlanOptions) -> dict[str, Any]:
    """Returns the options that are fields of a plan's configuration; None where `dsv3 train`'s default is taken."""
    names = ("batch_size", "micro_batch_size", "precision", "rematerialisation", "attention", "moment_dtype", "zero")
    given = {name: getattr(options, name) for name in (*names, "average", "optimizer", "schedule", "tokens")}
    return given | {"sequence_length": options.sequence_length or None}


def _deliver(plan: Plan, compiled: Any, options: PlanOptions) -> None:
    from rich.console import Console

    from dsv3_jax.planning.plan import plan_as_dict
    from dsv3_jax.planning.report_table import show

    values = plan_as_dict(plan)
    if compiled is not None:
        values["compiled"] = compiled.as_dict()
    reinforcement = None
    if options.grpo:
        from dsv3_jax.planning.reinforcement import ReinforcementMemory

        reinforcement = ReinforcementMemory.of(plan, options.grpo, reference=options.grpo_reference)
        values["reinforcement_learning"] = reinforcement.as_dict()
    text = json.dumps(values, indent=1)
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 110)
    if options.json:
        print(text)
    else:
        show(plan, console, compiled)
        if reinforcement is not None:
            console.print(reinforcement.table())
    if options.out:
        from dsv3_jax.planning.picture import draw_plan

        folder = _folder(options.out)
        (folder / "plan.json").write_text(text + "\n", encoding="utf-8")
        with (folder / "plan.txt").open("w", encoding="utf-8") as file:
            show(plan, Console(file=file, width=110), compiled)
            if reinforcement is not None:
                Console(file=file, width=110).print(reinforcement.table())
        draw_plan(plan, folder / "plan.png", compiled)


def _folder(name: str) -> Path:
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {name}: {error.strerror}; name a folder that can be written") from None
    return folder


def _search(options: PlanOptions) -> int:
    from rich.console import Console

    from dsv3_jax.planning.hardware import Target
    from dsv3_jax.planning.search import search, search_as_dict, show_search

    found = search(
        options.preset,
        Target.parse(options.target),
        options.search,
        compile_best=options.compile,
        say=lambda line: print(line, file=sys.stderr, flush=True),
        **_given(options),
    )
    text = json.dumps(search_as_dict(found), indent=1)
    if options.json:
        print(text)
    else:
        show_search(found, Console(width=None if sys.stdout.isatty() else 130))
    if options.out:
        (_folder(options.out) / "search.json").write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
