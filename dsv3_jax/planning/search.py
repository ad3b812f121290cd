"""Ranks every mesh that divides the model by its plan; the best can be compiled and ranked again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import ConfigError, UserError
from dsv3_jax.planning.compiled import CompiledPlan, compile_plan
from dsv3_jax.planning.config import FEWEST_TOKENS, PlanConfig, of_preset
from dsv3_jax.planning.hardware import Target
from dsv3_jax.planning.plan import Plan, make_plan, plan_as_dict
from dsv3_jax.planning.report_table import size
from dsv3_jax.sharding.mesh import AXES, MeshConfig
from dsv3_jax.training.defaults import default_run

_COMPILED = 3  # of the best plans
_MOST_STAGES = 64
_MOST_TENSOR_RANKS = 8


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One mesh.

    Attributes:
      plan: the plan of the run on it.
      compiled: the compiler's figures, where it was asked.
      refused: why the compiler has none.
    """

    plan: Plan
    compiled: CompiledPlan | None = None
    refused: str = ""

    @property
    def fits(self) -> bool:
        """Whether a device has the memory: by the compiler where it was asked, else by the plan."""
        if self.compiled is not None:
            return self.compiled.peak_bytes <= self.plan.config.target.accelerator.memory
        return self.plan.fits and not self.refused

    @property
    def rank(self) -> tuple[bool, float, float]:
        """Its place in an order of those that fit first, then by time per token, then by memory."""
        memory = self.compiled.peak_bytes if self.compiled else self.plan.memory
        return (not self.fits, self.plan.at_the_reports_pace / self.plan.config.tokens_per_step, memory)


def search(
    preset: str,
    target: Target,
    count: int,
    *,
    compile_best: bool = False,
    say: Callable[[str], None] = lambda line: None,
    **given: Any,
) -> list[Candidate]:
    """Returns the `count` best meshes for a preset's run, all with the same batch if any mesh can take it.

    Args:
      compile_best: compile the best of them and rank these before the others.
      say: is told what is compiled next, which takes minutes.
      given: as in `planning.config.of_preset`.

    Raises:
      UserError: no mesh divides the model and the batch.
    """
    configs = []
    length = given.get("sequence_length") or default_run(preset).data.sequence_length
    for mesh in meshes(ModelConfig.preset(preset), target.devices, length):
        try:
            configs.append(of_preset(preset, target, mesh, **given))
        except ConfigError:
            continue
    if not configs:
        raise UserError(f"no mesh of {target.name} divides this model and batch; change --target or --batch-size")
    if given.get("batch_size") is None:
        smallest = min(config.batch_size for config in configs)
        configs = [config for config in configs if config.batch_size == smallest]
    found = [_candidate(config, may_shrink=given.get("micro_batch_size") is None) for config in configs]
    found = sorted(found, key=lambda candidate: candidate.rank)[:count]
    if not compile_best:
        return found
    chosen, rest = found[:_COMPILED], found[_COMPILED:]
    compiled = []
    for number, candidate in enumerate(chosen, start=1):
        say(f"compiling {number} of {len(chosen)}: {candidate.plan.config.mesh.written}")
        compiled.append(_compiled(candidate))
    return [*sorted(compiled, key=lambda candidate: candidate.rank), *rest]


def _candidate(config: PlanConfig, *, may_shrink: bool) -> Candidate:
    """Returns a mesh's plan, if allowed with micro-batches of one sequence where larger ones do not fit."""
    plan = make_plan(config)
    if plan.fits or config.micro_batch_size == 1 or not may_shrink:
        return Candidate(plan)
    return Candidate(make_plan(dataclasses.replace(config, micro_batch_size=1)))


def meshes(model: ModelConfig, devices: int, length: int) -> Iterator[MeshConfig]:
    """Yields every mesh of `devices` whose axes divide experts and heads, with at most a stage per layer.

    Without stages long sequences may be divided too, into powers of two.

    Args:
      length: tokens of a sequence.
    """
    for stage in _divisors(devices):
        if stage > min(_MOST_STAGES, model.num_hidden_layers):
            continue
        for expert in _divisors(devices // stage):
            if model.n_routed_experts % expert:
                continue
            for tensor in _divisors(devices // stage // expert):
                if tensor > _MOST_TENSOR_RANKS or model.num_attention_heads % tensor:
                    continue
                rest = devices // stage // expert // tensor
                for context in _contexts(rest, model.num_attention_heads // tensor, length if stage == 1 else 0):
                    for fsdp in _divisors(rest // context):
                        sizes = {"fsdp": fsdp, "context": context, "expert": expert, "tensor": tensor}
                        yield MeshConfig(stage=stage, data=rest // context // fsdp, **sizes)


def _contexts(devices: int, heads: int, length: int) -> Iterator[int]:
    """Yields the powers of two that divide devices, heads and length, 1 included."""
    context = 1
    while devices % context == heads % context == length % context == 0:
        yield context
        context *= 2
        if length < context * FEWEST_TOKENS:
            return


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _compiled(candidate: Candidate) -> Candidate:
    try:
        return dataclasses.replace(candidate, compiled=compile_plan(candidate.plan.config))
    except UserError as error:
        return dataclasses.replace(candidate, refused=str(error))


def search_as_dict(found: list[Candidate]) -> list[dict[str, Any]]:
    """Returns plain values for JSON, best first."""
    return [
        plan_as_dict(candidate.plan)
        | {"compiled": candidate.compiled.as_dict() if candidate.compiled else None, "refused": candidate.refused}
        for candidate in found
    ]


def show_search(found: list[Candidate], console: Console) -> None:
    """Prints the ranking."""
    title = f"Meshes of {found[0].plan.config.target.name}, best first"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    columns = list(AXES)
    columns += ["sequences", "memory", "to spare", "tokens/s per device", "MFU"]
    with_compiler = any(candidate.compiled or candidate.refused for candidate in found)
    for name in columns + ["compiler's peak"] * with_compiler:
        table.add_column(name, justify="right")
    for candidate in found:
        plan, seconds = candidate.plan, candidate.plan.at_the_reports_pace
        row = [str(value) for value in plan.config.mesh.sizes.values()]
        row += [f"{plan.config.batch_size:,}", size(plan.memory), size(plan.spare)]
        row += [f"{plan.tokens_per_device(seconds):,.0f}", f"{100 * plan.mfu(seconds):.1f}%"]
        if with_compiler:
            row.append(candidate.refused or (size(candidate.compiled.peak_bytes) if candidate.compiled else ""))
        table.add_row(*row, style=None if candidate.fits else "red")
    console.print(table)
