"""Finds the options that would make a plan fit, or save memory: each is changed alone and the plan made again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from dsv3_jax.errors import ConfigError
from dsv3_jax.planning.config import FEWEST_TOKENS, PlanConfig
from dsv3_jax.planning.hardware import Target
from dsv3_jax.planning.plan import Plan, make_plan

_WORTH_SAVING = 0.01  # of the plan's memory


@dataclasses.dataclass(frozen=True)
class Advice:
    """One changed option.

    Attributes:
      change: the options of `dsv3 train`, as written on its command line.
      saved: bytes per device.
      fits: whether it is enough.
      slower: expected time per token over the plan's, minus one.
    """

    change: str
    saved: float
    fits: bool
    slower: float


def advise(plan: Plan) -> list[Advice]:
    """Returns options that save memory: those that are enough first, the cheapest in time first; then by memory."""
    found = []
    for config in _changed(plan.config):
        other = make_plan(config)
        saved = plan.memory - other.memory
        if saved > _WORTH_SAVING * plan.memory:
            per_token = [p.expected.total * p.config.target.devices / p.config.tokens_per_step for p in (plan, other)]
            change = _written(plan.config, config)
            found.append(Advice(change, saved, other.fits, per_token[1] / per_token[0] - 1))
    return sorted(found, key=lambda advice: (not advice.fits, advice.slower if advice.fits else -advice.saved))


def _written(before: PlanConfig, after: PlanConfig) -> str:
    """Returns the options of `dsv3 train` that differ, and the devices if they do."""
    options = before.train_options
    changed = [f"{name} {value}".strip() for name, value in after.train_options.items() if options.get(name) != value]
    more = after.target.devices != before.target.devices
    return " ".join([f"{after.target.devices:,} devices with"] * more + changed)


def _changed(config: PlanConfig) -> Iterator[PlanConfig]:
    """Yields the configurations with one option changed that are possible."""
    for changes in _changes(config):
        try:
            yield dataclasses.replace(config, **changes)
        except ConfigError:
            continue


def _changes(config: PlanConfig) -> Iterator[dict[str, Any]]:
    mesh = config.mesh
    for policy in ("report", "full"):
        if policy != config.rematerialisation:
            yield {"rematerialisation": policy}
    if config.recipe.dtype.itemsize > 2:
        yield {"precision": "bfloat16"}
    if config.recipe.fp8 is None:
        yield {"precision": "fp8"}
    if config.run.moment_dtype != "bfloat16":
        yield {"moment_dtype": "bfloat16"}
    if config.average == "device":
        yield {"average": "none"}
    if not config.zero:
        yield {"zero": True}
    if config.micro_batch_size > 1:
        yield {"micro_batch_size": config.micro_batch_size // 2}
    sinks = ["fsdp", "expert", "tensor"]
    if mesh.context == 1:
        sinks.append("stage")
    if mesh.stage == 1 and config.sequence_length >= 2 * mesh.context * FEWEST_TOKENS:
        sinks.append("context")
    for source in ("data", "fsdp", "expert"):
        for sink in sinks:
            size = getattr(mesh, source)
            if sink != source and size % 2 == 0:
                moved = dataclasses.replace(mesh, **{source: size // 2, sink: 2 * getattr(mesh, sink)})
                yield {"mesh": moved}
    accelerator, devices = config.target.accelerator, 2 * config.target.devices
    if devices <= accelerator.largest and accelerator.platform != "cpu":
        wider = dataclasses.replace(mesh, fsdp=2 * mesh.fsdp)
        yield {"target": Target(accelerator, devices), "mesh": wider, "batch_size": 2 * config.batch_size}
