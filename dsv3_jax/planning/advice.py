"""Which knob would make a plan fit, or give it more room: every knob is turned alone and the plan made again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from dsv3_jax.errors import ConfigError
from dsv3_jax.planning.config import PlanConfig
from dsv3_jax.planning.hardware import Target
from dsv3_jax.planning.plan import Plan, make_plan


@dataclasses.dataclass(frozen=True)
class Advice:
    """One changed knob.

    Attributes:
      change: as one would write it on the command line.
      saved: bytes a device.
      fits: whether it is enough.
      slower: expected time a token over the plan's, less one.
    """

    change: str
    saved: float
    fits: bool
    slower: float


def advise(plan: Plan) -> list[Advice]:
    """Knobs that save memory: those that suffice first, the cheapest in time first; then by what they save."""
    found = []
    for change, config in _changed(plan.config):
        try:
            other = make_plan(config())
        except ConfigError:
            continue  # this knob does not turn here
        saved = plan.memory - other.memory
        if saved > 0.01 * plan.memory:
            per_token = [p.expected.total * p.config.target.devices / p.config.tokens_a_step for p in (plan, other)]
            found.append(Advice(change, saved, other.fits, per_token[1] / per_token[0] - 1))
    return sorted(found, key=lambda advice: (not advice.fits, advice.slower if advice.fits else -advice.saved))


def _changed(config: PlanConfig) -> Iterator[tuple[str, Callable[[], PlanConfig]]]:
    mesh = config.mesh

    def replaced(**changes: object):
        return lambda: dataclasses.replace(config, **changes)  # pyright: ignore[reportArgumentType]

    def meshed(**changes: int):
        return replaced(mesh=dataclasses.replace(mesh, **changes))

    for policy in ("report", "full"):
        if policy != config.rematerialisation:
            yield f"--rematerialisation {policy}", replaced(rematerialisation=policy)
    if config.precision == "float32":
        yield "--precision bfloat16", replaced(precision="bfloat16")
    if config.precision != "fp8":
        yield "--precision fp8", replaced(precision="fp8")
    if config.moment_width > 2:
        yield "--moment-dtype bfloat16", replaced(moment_dtype="bfloat16")
    if config.gradient_dtype != "bfloat16":
        yield "--gradient-dtype bfloat16", replaced(gradient_dtype="bfloat16")
    if config.average == "device":
        yield "--average host", replaced(average="host")
    if not config.zero:
        yield "--zero", replaced(zero=True)
    if config.micro_batch_size > 1:
        yield (
            f"--micro-batch-size {config.micro_batch_size // 2}",
            replaced(micro_batch_size=config.micro_batch_size // 2),
        )
    for source in ("data", "fsdp", "expert"):
        for sink in ("fsdp", "expert", "tensor", "stage"):
            size = getattr(mesh, source)
            if sink != source and size % 2 == 0:
                change = {source: size // 2, sink: 2 * getattr(mesh, sink)}
                yield f"--mesh ...,{','.join(f'{k}={v}' for k, v in change.items())}", meshed(**change)
    more = Target(config.target.accelerator, 2 * config.target.devices)
    if more.devices <= more.accelerator.largest and more.accelerator.platform != "cpu":
        wider = dataclasses.replace(mesh, fsdp=2 * mesh.fsdp)
        yield (
            f"{more.devices:,} devices with fsdp={wider.fsdp}",
            replaced(target=more, mesh=wider, batch_size=2 * config.batch_size),
        )
