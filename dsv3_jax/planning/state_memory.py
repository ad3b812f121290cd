"""Bytes a device holds of weights, gradients, optimizer state and running average (report sections 3.2.3, 3.3.3)."""

from __future__ import annotations

import dataclasses
from collections import Counter

from dsv3_jax.planning.config import PlanConfig
from dsv3_jax.planning.layers import LayerKind, ParameterGroup, parameter_groups
from dsv3_jax.planning.precision_bytes import width_of


@dataclasses.dataclass(frozen=True)
class StateMemory:
    """Bytes on one device, and in the host's memory for it.

    Attributes:
      parameters: elements whose gradients this device computes.
      masters: what the optimizer moves.
      working_weights: the copy that products read, where the masters are divided over replicas (ZeRO-1).
      gathered_weights: layers put together from their FSDP shards for the time they are used, their gradients likewise.
      gradients: accumulated over the step.
      moments: Adam's two.
      average: on the device.   host_average: in the host's memory.
    """

    parameters: float
    masters: float
    working_weights: float
    gathered_weights: float
    gradients: float
    moments: float
    average: float
    host_average: float

    @property
    def on_device(self) -> float:
        """All of it that is device memory."""
        return (
            self.masters + self.working_weights + self.gathered_weights + self.gradients + self.moments + self.average
        )


def groups_of(config: PlanConfig, layers: Counter[LayerKind]) -> list[tuple[ParameterGroup, int]]:
    """Every group of these layers with how many layers have it."""
    return [(group, count) for kind, count in layers.items() for group in parameter_groups(config.model, kind)]


def state_memory(config: PlanConfig, layers: Counter[LayerKind], *, copies: int = 1) -> StateMemory:
    """Of a rank that holds these layers, but for the step with stages (`stage_step`).

    Args:
      copies: ranks of the stage axis that hold the same layers (2 under DualPipe), replicas like any others.
    """
    mesh, formats = config.mesh, config.formats
    master_width = width_of(config.master_dtype)
    totals = dict.fromkeys(("parameters", "masters", "working", "moments"), 0.0)
    for group, count in groups_of(config, layers):
        held = count * group.on_a_device(mesh)
        replicas = copies * group.replicas(mesh) if config.zero else 1
        totals["parameters"] += held
        totals["masters"] += held / (1 if config.is_training_step else replicas) * master_width
        totals["moments"] += held / replicas * 2 * config.moment_width
        if replicas > 1 and not config.is_training_step:
            totals["working"] += held * (formats.weight if group.fp8 else formats.compute)
    average = totals["masters"] if config.average != "none" else 0.0
    return StateMemory(
        parameters=totals["parameters"],
        masters=totals["masters"],
        working_weights=totals["working"],
        gathered_weights=0.0 if mesh.fsdp == 1 else max(gathered_layer(config, kind, ahead=1) for kind in layers),
        gradients=totals["parameters"] * width_of(config.gradient_dtype),
        moments=totals["moments"],
        average=average if config.average == "device" else 0.0,
        host_average=average if config.average == "host" else 0.0,
    )


def gathered_width(config: PlanConfig, group: ParameterGroup) -> float:
    """Bytes of a weight on its way between the shards of FSDP.

    The step gathers as masters what the FP8 recipe cuts into tiles, which must be those of the stored weight; experts,
    whose gradients are summed in float32 over a step's pieces; and routers, which choose in float32. Of the embedding
    it gathers nothing: rows of the table travel.
    """
    formats = config.formats
    if not config.is_training_step:
        return formats.weight if group.fp8 else formats.compute
    if group.name == "embedding":
        return 0.0
    as_stored = group.name in ("routed_experts", "router") or (formats.is_fp8 and group.fp8)
    return width_of(config.master_dtype) if as_stored else formats.compute


def gathered_layer(config: PlanConfig, kind: LayerKind, *, ahead: int) -> float:
    """Bytes of a layer put together from its FSDP shards, `ahead` more whose turn comes next, and its gradients."""
    groups = parameter_groups(config.model, kind)
    sizes = [(group.on_a_device(config.mesh) * config.mesh.fsdp, group) for group in groups if group.axes]
    weights = sum(size * gathered_width(config, group) for size, group in sizes)
    return (1 + ahead) * weights + width_of(config.gradient_dtype) * sum(size for size, _ in sizes)
