"""Maps the logical axes that parameters carry to the axes of a mesh, by one table from which shardings are derived.

Parameters declare their logical axes where they are made (`dsv3_jax.modules.parameter`). Optimizer moments, gradients,
the running average and everything else that is mapped from the parameters carry the same axes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from dsv3_jax.modules.parameter import ParameterShape

Tree = Any
"""A pytree that contains nnx Variables of arrays or of their shapes: parameters, or a whole train state."""

BATCH_AXES = ("data", "fsdp", "expert")
"""Mesh axes over which the sequences of a batch are sharded."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AxisRules:
    """Mesh axes of every logical axis.

    An axis that does not divide a dimension, or that shards an earlier dimension of the same array, is left out.

    Attributes:
      embed: the hidden size, one side of every matrix: FSDP, and pipeline stages where they do not divide the layers
        evenly.
      wide: heads, feed-forward widths and the vocabulary: tensor parallelism.
      latent: outputs of the down-projections and of routers.
      expert: routed experts.
      expert_width: the inner width of routed experts.
      layers: stacked layers.
    """

    embed: tuple[str, ...] = ("fsdp", "stage")
    wide: tuple[str, ...] = ("tensor",)
    latent: tuple[str, ...] = ()
    expert: tuple[str, ...] = ("expert",)
    expert_width: tuple[str, ...] = ("tensor",)
    layers: tuple[str, ...] = ("stage",)


ZERO = AxisRules(embed=("fsdp", "stage", "data"), wide=("tensor", "expert"), latent=("expert",))
"""Rules of optimizer state that is sharded over the replicas of its parameters too (ZeRO-1)."""

WITHIN_A_STAGE = AxisRules(embed=("fsdp",), layers=())
"""Rules of the weights that a pipeline stage computes with: all of its own layers, and all that every stage has."""


def rules_over_stages(layers: Sequence[int], zero: bool = False) -> AxisRules:
    """Returns the rules of parameters where each pipeline stage holds `layers` stacked MoE layers (report 3.2.1).

    A stack is sharded over the stages by layers only where all stages hold equally many. Otherwise every matrix is
    sharded over the stages along its hidden dimension.

    Args:
      layers: one number per stage, or none.
      zero: whether the rules are for optimizer state that is sharded over replicas.
    """
    rules = ZERO if zero else AxisRules()
    return rules if len(set(layers)) <= 1 else dataclasses.replace(rules, layers=())


def parameter_specs(tree: Tree, mesh: Mesh | AbstractMesh, rules: AxisRules | None = None) -> Tree:
    """Returns the PartitionSpec of each leaf of `tree`.

    A leaf outside a Variable, or whose Variable declares no axes, is replicated.
    """
    rules = rules or AxisRules()

    def specs(node: Any) -> Any:
        if not isinstance(node, nnx.Variable):
            return PartitionSpec()
        axes = node.get_metadata().get("out_sharding") or ()
        return jax.tree.map(lambda leaf: _spec(axes, leaf.shape, mesh, rules), node)

    return jax.tree.map(specs, tree, is_leaf=lambda node: isinstance(node, nnx.Variable))


def weight_axes(shape: ParameterShape, mesh: Mesh | AbstractMesh, rules: AxisRules) -> tuple[str | None, ...]:
    """Returns the one mesh axis, or None, of every dimension of a layer's weight under rules that name one at most."""
    spec = _spec(shape.axes, shape.shape, mesh, rules)
    return (*spec, *[None] * (len(shape.shape) - len(spec)))


def shardings(tree: Tree, mesh: Mesh, rules: AxisRules | None = None) -> Tree:
    """Returns the NamedSharding of each leaf of `tree`, as `parameter_specs` has its PartitionSpec."""
    specs = parameter_specs(tree, mesh, rules)
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec)
    )


def batch_spec(leading: int = 0) -> PartitionSpec:
    """Returns the PartitionSpec of a batch [..., B, T] with that many dimensions before B."""
    return PartitionSpec(*[None] * leading, BATCH_AXES)


def _spec(
    logical: Sequence[str | None], shape: tuple[int, ...], mesh: Mesh | AbstractMesh, rules: AxisRules
) -> PartitionSpec:
    if len(logical) != len(shape):  # no axes, or an array that belongs to the weight, such as FP8 scales
        return PartitionSpec()
    used: set[str] = set()
    parts = []
    for name, size in zip(logical, shape, strict=True):
        axes: list[str] = []
        for axis in getattr(rules, name) if name else ():
            ways = math.prod(mesh.shape[other] for other in [*axes, axis])
            if axis not in used and mesh.shape[axis] > 1 and size % ways == 0:
                axes.append(axis)
        used.update(axes)
        parts.append(None if not axes else axes[0] if len(axes) == 1 else tuple(axes))
    return PartitionSpec(*parts)
