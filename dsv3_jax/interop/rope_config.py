"""Reads the fields of a published `config.json` that describe RoPE and YaRN, and checks single numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from dsv3_jax.bounded_json import shown
from dsv3_jax.config import RopeScaling
from dsv3_jax.errors import ConfigError

_ROPE_KEYS = {field.name for field in dataclasses.fields(RopeScaling)}


def read_rope(values: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Returns theta and YaRN's fields from `rope_theta` and `rope_scaling`, or from the newer `rope_parameters`."""
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(values.get(name), dict | None):
            raise ConfigError(f"{name} must be an object or null, not {shown(values[name])}")
    newer, older = values.get("rope_parameters"), values.get("rope_scaling")
    parameters = dict(newer if newer is not None else older or {})
    inner_theta = parameters.pop("rope_theta", None)
    theta = values.get("rope_theta")
    if theta is None:
        theta = 10000.0 if inner_theta is None else inner_theta
    elif inner_theta is not None and inner_theta != theta:
        raise ConfigError("rope_theta and the rope_theta inside rope_parameters differ")
    kinds = {parameters.pop(key) for key in ("type", "rope_type") if isinstance(parameters.get(key), str)}
    theta = finite_number("rope_theta", theta)
    if kinds <= {"default"}:
        if parameters and not kinds:
            raise ConfigError("rope_scaling has no type; this architecture supports yarn only")
        return theta, None
    if kinds != {"yarn"}:
        raise ConfigError(f"rope_scaling type is {shown(sorted(kinds))}; this architecture supports yarn only")
    return theta, _yarn(parameters)


def _yarn(parameters: dict[str, Any]) -> RopeScaling:
    if parameters.pop("attention_factor", None) is not None:
        raise ConfigError("rope_scaling.attention_factor is not part of this architecture")
    if parameters.pop("truncate", True) is not True:
        raise ConfigError("rope_scaling.truncate must be true")
    unknown = sorted(set(parameters) - _ROPE_KEYS)
    if unknown:
        raise ConfigError(f"rope_scaling has unknown fields {', '.join(map(shown, unknown[:5]))}")
    for name in ("factor", "original_max_position_embeddings"):
        if name not in parameters:
            raise ConfigError(f"rope_scaling.{name} is missing")
    fields: dict[str, Any] = {
        name: finite_number(f"rope_scaling.{name}", value) for name, value in parameters.items() if value is not None
    }
    fields["original_max_position_embeddings"] = whole_number(
        "rope_scaling.original_max_position_embeddings", parameters["original_max_position_embeddings"]
    )
    # The defaults of the published modelling code: it scales cos and sin and leaves the softmax as it is.
    return RopeScaling(**{"mscale": 1.0, "mscale_all_dim": 0.0, **fields})


def whole_number(name: str, value: Any) -> int:
    """Returns the value of a field; raises ConfigError where it is no whole number."""
    if type(value) is not int:
        raise ConfigError(f"{name} must be a whole number, not {shown(value)}")
    return value


def finite_number(name: str, value: Any) -> float:
    """Returns the value of a field as a float; raises ConfigError where it is no finite number."""
    if type(value) not in (int, float) or not math.isfinite(_as_float(value)):
        raise ConfigError(f"{name} must be a finite number, not {shown(value)}")
    return float(value)


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf
