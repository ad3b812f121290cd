"""A plan's configuration as JSON, for the process that compiles it."""

from __future__ import annotations

import dataclasses
from typing import Any

from dsv3_jax.config import ModelConfig
from dsv3_jax.planning.config import PlanConfig
from dsv3_jax.planning.hardware import Target
from dsv3_jax.sharding.mesh import MeshConfig


def to_json(config: PlanConfig) -> dict[str, Any]:
    """Plain values."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    target = config.target
    return values | {
        "model": config.model.to_dict(),
        "target": {
            "accelerator": dataclasses.asdict(target.accelerator),
            "devices": target.devices,
            "topology": target.topology,
        },
        "mesh": dataclasses.asdict(config.mesh),
    }


def from_json(values: dict[str, Any]) -> PlanConfig:
    """The inverse of `to_json`."""
    from dsv3_jax.planning.hardware import Accelerator

    target = values["target"]
    return PlanConfig(
        **values
        | {
            "model": ModelConfig.from_dict(values["model"]),
            "target": Target(Accelerator(**target["accelerator"]), target["devices"], tuple(target["topology"])),
            "mesh": MeshConfig(**values["mesh"]),
        }
    )
