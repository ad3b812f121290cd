"""Where the weights of a pipelined training step lie: in the state, and while a stage works with them.

Read from the rules that the step itself uses (`sharding.rules`), applied to shapes; what a rank's program makes of them
is as in `pipeline.weights`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec

from dsv3_jax.config import ModelConfig
from dsv3_jax.model import abstract_model
from dsv3_jax.pipeline.slots import moe_layers_of_stages
from dsv3_jax.planning.config import PlanConfig
from dsv3_jax.planning.layers import LayerKind
from dsv3_jax.sharding.mesh import MeshConfig
from dsv3_jax.sharding.ranks import axes_of
from dsv3_jax.sharding.rules import BATCH_AXES, parameter_specs, rules_over_stages

_STAGE = "stage"


@dataclasses.dataclass(frozen=True)
class StageWeight:
    """One leaf of the parameter tree; elements on one device.

    Attributes:
      kind: of the layers it belongs to; "head" has the final norm too.
      in_state: of the master weight.   moment: of each of Adam's moments.
      in_stage: what a rank works with while the step runs: of all places of its one or two stages, or, of what is not
        a MoE layer, everything.
      opposite: those of them that come from the opposite rank.
      cut: the dimension that lies on the stage axis; None where every rank of it has all.
      replicas: axes of the batch whose ranks have the same part.
    """

    kind: LayerKind
    in_state: float
    moment: float
    in_stage: float
    opposite: float
    cut: int | None
    replicas: tuple[str, ...]


def directions_of(config: PlanConfig) -> int:
    """Stages whose layers a rank holds while the step runs."""
    return 2 if config.schedule == "dualpipe" else 1


def stage_weights(config: PlanConfig) -> tuple[StageWeight, ...]:
    """Every leaf of the tree."""
    return _stage_weights(config.model, config.mesh, directions_of(config), config.zero)


@functools.lru_cache(maxsize=256)
def _stage_weights(model: ModelConfig, mesh: MeshConfig, directions: int, zero: bool) -> tuple[StageWeight, ...]:
    tree = nnx.state(abstract_model(model), nnx.Param)
    layers = moe_layers_of_stages(model, mesh.stage)
    # The rules ask a mesh for the sizes of its axes and for nothing else.
    on: Any = AbstractMesh(tuple(mesh.sizes.values()), tuple(mesh.sizes))
    shapes = jax.tree_util.tree_leaves_with_path(tree)
    specs = _leaves(parameter_specs(tree, on, rules_over_stages(layers)))
    moments = _leaves(parameter_specs(tree, on, rules_over_stages(layers, zero=True))) if zero else specs
    found = []
    for (path, shape), spec, moment in zip(shapes, specs, moments, strict=True):
        kind = _KINDS[str(path[0].key)]
        elements = math.prod(shape.shape)
        working = elements / _ways(spec, mesh, leave_out=_STAGE)
        opposite = 0.0
        if kind == "moe":
            working *= max(layers) / model.num_moe_layers
            opposite = working * (directions - 1)
        in_state, of_moment = (elements / _ways(one, mesh) for one in (spec, moment))
        axes = [axes_of(entry) for entry in spec]
        cut = next((dimension for dimension, names in enumerate(axes) if _STAGE in names), None)
        replicas = tuple(axis for axis in BATCH_AXES if all(axis not in names for names in axes))
        found.append(StageWeight(kind, in_state, of_moment, working + opposite, opposite, cut, replicas))
    return tuple(found)


_KINDS: dict[str, LayerKind] = {
    "embedding": "embedding",
    "dense_blocks": "dense",
    "moe_blocks": "moe",
    "mtp": "mtp",
    "final_norm": "head",
    "head": "head",
}


def _leaves(specs: Any) -> list[PartitionSpec]:
    return jax.tree.leaves(specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))


def _ways(spec: PartitionSpec, mesh: MeshConfig, leave_out: str = "") -> int:
    """Parts that a spec cuts an array into."""
    return math.prod(mesh.sizes[axis] for entry in spec for axis in axes_of(entry) if axis != leave_out)
