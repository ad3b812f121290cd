"""The units in which the report deploys the model, the published figures of DeepSeek's own service, and a table."""

from __future__ import annotations

import dataclasses
from typing import Any

from dsv3_jax.config import ModelConfig
from dsv3_jax.planning.hardware import Target
from dsv3_jax.planning.serving import Phase, ServingEstimate, ServingUnit, estimate

PUBLISHED = {"prefill": 73_700, "decode": 14_800}
"""Tokens per second of a node of eight H800s, as published for 27 February 2025: those of prompts, of which 56.3 % were
found in a cache and not computed, and those generated, at a mean of 4,989 cached tokens and 20 to 22 tokens per second
for each user. The service's units had 32 and 144 devices and no tensor parallelism."""

_CACHE_HITS = 0.563
_DEFAULTS: dict[Phase, dict[str, int]] = {
    "prefill": {"batch": 16_384, "context": 4096},  # of the published profile
    "decode": {"batch": 88, "context": 4989},  # 1,850 tokens per second and device at 21 for each user
}


def report_unit(phase: Phase, config: ModelConfig, target: Target, **changes: int | None) -> ServingUnit:
    """Returns a unit with the published batch and context, and tensor groups of 4, where no change is given.

    A decode unit in whose memory the published number of requests does not fit gets as many as fit.
    """
    given = {name: value for name, value in changes.items() if value}
    unit = ServingUnit(config=config, target=target, phase=phase, **(_DEFAULTS[phase] | given))
    fitting = estimate(unit).cache_tokens // (unit.tensor * unit.context)
    if phase == "decode" and "batch" not in given and 0 < fitting < unit.batch:
        unit = dataclasses.replace(unit, batch=fitting)
    return unit


def as_dict(unit: ServingUnit) -> dict[str, Any]:
    """Returns the unit and its estimate as values for JSON."""
    result = estimate(unit)
    return {
        "phase": unit.phase,
        "device": unit.target.accelerator.name,
        "devices": unit.target.devices,
        "tensor": unit.tensor,
        "redundant_experts": unit.redundant,
        "experts_per_device": unit.experts_per_device,
        "batch": unit.batch,
        "context": unit.context,
        **dataclasses.asdict(result),
        "tokens_per_second_of_eight": 8 * result.tokens_per_second,
    }


def lines(unit: ServingUnit) -> list[str]:
    """Returns the table of a unit as lines of text."""
    result = estimate(unit)
    what = "tokens of prompts" if unit.phase == "prefill" else "requests"
    rows = [
        ("unit", f"{unit.phase}, {unit.target.devices} {unit.target.accelerator.name}, attention on {unit.tensor}"),
        ("routed experts of a device", f"{unit.experts_per_device} ({unit.redundant} redundant in all)"),
        ("batch of a device", f"{unit.batch:,} {what}, context {unit.context:,}"),
        ("weights of a device", f"{result.weights / 1e9:.1f} GB"),
        ("cache of a device", f"{result.cache_needed:,} tokens needed, {result.cache_tokens:,} fit"),
        *((f"{name} of a step", f"{1e3 * seconds:.1f} ms") for name, seconds in result.seconds.items()),
        ("step", f"{1e3 * result.step:.1f} ms" + _per_user(unit, result)),
        ("tokens per second of 8 devices", f"{8 * result.tokens_per_second:,.0f}"),
    ]
    if result.cache_needed > result.cache_tokens:
        rows.append(("warning", "the cache does not fit: use a smaller batch or more devices"))
    if unit.target.accelerator.name == "H800" and unit.config == ModelConfig.preset("v3-671b"):
        published = PUBLISHED[unit.phase]
        computed = f", {published * (1 - _CACHE_HITS):,.0f} of them computed" if unit.phase == "prefill" else ""
        rows.append(("published, 8 H800s", f"{published:,}{computed}"))
    width = max(len(name) for name, _ in rows)
    return [f"{name:{width}}  {value}" for name, value in rows]


def _per_user(unit: ServingUnit, result: ServingEstimate) -> str:
    return f", {1 / result.step:.0f} tokens per second for each request" if unit.phase == "decode" else ""
