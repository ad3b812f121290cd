"""Which mesh: every shape that divides the model, ranked on paper; the best compiled and ranked again."""

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
from dsv3_jax.planning.config import PlanConfig
from dsv3_jax.planning.hardware import Target
from dsv3_jax.planning.plan import Plan, make_plan, plan_as_dict
from dsv3_jax.planning.published import like_the_report
from dsv3_jax.planning.report_table import size
from dsv3_jax.sharding.mesh import MeshConfig

_COMPILED = 3  # of the best on paper
_MOST_STAGES = 64


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One mesh. `compiled` where it was, `refused` why it could not be."""

    plan: Plan
    compiled: CompiledPlan | None = None
    refused: str = ""

    @property
    def fits(self) -> bool:
        """By the compiler where it was asked, else on paper."""
        if self.compiled is not None:
            return self.compiled.peak_bytes <= self.plan.config.target.accelerator.memory
        return self.plan.fits and not self.refused

    @property
    def seconds_a_token(self) -> float:
        """Expected, over the whole cluster."""
        return like_the_report(self.plan) / self.plan.config.tokens_a_step

    @property
    def rank(self) -> tuple[bool, float, float]:
        """Those that fit first, then by time, then by memory."""
        memory = self.compiled.peak_bytes if self.compiled else self.plan.memory
        return (not self.fits, self.seconds_a_token, memory)


def search(
    model: ModelConfig,
    target: Target,
    count: int,
    *,
    compile_best: bool = False,
    say: Callable[[str], None] = lambda line: None,
    **run: Any,
) -> list[Candidate]:
    """The `count` best meshes for a run.

    Args:
      say: is told what is compiled next, which takes minutes.
      run: the other fields of PlanConfig.
      compile_best: compile the best of those on paper and rank these before the others.
    """
    found = []
    for mesh in meshes(model, target.devices):
        try:
            found.append(Candidate(make_plan(PlanConfig(model=model, target=target, mesh=mesh, **run))))
        except ConfigError:
            continue
    found = sorted(found, key=lambda candidate: candidate.rank)[:count]
    if not compile_best:
        return found
    chosen, rest = found[:_COMPILED], found[_COMPILED:]
    compiled = []
    for number, candidate in enumerate(chosen, start=1):
        say(f"compiling {number} of {len(chosen)}: {candidate.plan.config.mesh.written}")
        compiled.append(_compiled(candidate))
    return [*sorted(compiled, key=lambda candidate: candidate.rank), *rest]


def meshes(model: ModelConfig, devices: int) -> Iterator[MeshConfig]:
    """Every mesh of `devices` whose axes divide experts, heads and widths; stages up to one a layer."""
    for stage in _divisors(devices):
        if stage > min(_MOST_STAGES, model.num_hidden_layers):
            continue
        for expert in _divisors(devices // stage):
            if model.n_routed_experts % expert:
                continue
            for tensor in _divisors(devices // stage // expert):
                if tensor > 8 or model.num_attention_heads % tensor:
                    continue
                rest = devices // stage // expert // tensor
                for fsdp in _divisors(rest):
                    yield MeshConfig(stage=stage, data=rest // fsdp, fsdp=fsdp, expert=expert, tensor=tensor)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _compiled(candidate: Candidate) -> Candidate:
    try:
        return dataclasses.replace(candidate, compiled=compile_plan(candidate.plan.config))
    except UserError as error:
        return dataclasses.replace(candidate, refused=str(error))


def search_as_dict(found: list[Candidate]) -> list[dict[str, Any]]:
    """For JSON, best first."""
    return [
        plan_as_dict(candidate.plan)
        | {"compiled": candidate.compiled.as_dict() if candidate.compiled else None, "refused": candidate.refused}
        for candidate in found
    ]


def show_search(found: list[Candidate], console: Console) -> None:
    """Prints the ranking."""
    config = found[0].plan.config
    title = f"Meshes of {config.target.name}, best first"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in (
        "stage",
        "data",
        "fsdp",
        "expert",
        "tensor",
        "sequences",
        "memory",
        "to spare",
        "tokens/s a device",
        "MFU",
    ):
        table.add_column(name, justify="right")
    with_compiler = any(candidate.compiled or candidate.refused for candidate in found)
    if with_compiler:
        table.add_column("compiler's peak", justify="right")
    for candidate in found:
        plan, mesh = candidate.plan, candidate.plan.config.mesh
        seconds = like_the_report(plan)
        rate = plan.config.tokens_a_step / seconds / plan.config.target.devices
        row = [str(value) for value in dataclasses.astuple(mesh)]
        row += [f"{plan.config.batch_size:,}", size(plan.memory), size(plan.spare), f"{rate:,.0f}"]
        row.append(f"{100 * plan.mfu(seconds):.1f}%")
        if with_compiler:
            row.append(candidate.refused or (size(candidate.compiled.peak_bytes) if candidate.compiled else ""))
        table.add_row(*row, style=None if candidate.fits else "red")
    console.print(table)
