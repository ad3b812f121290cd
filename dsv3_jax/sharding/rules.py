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

MeshAxes = str | tuple[str, ...] | None
"""The mesh axes over which a dimension is sharded: an entry of a PartitionSpec."""

CONTEXT = "context"
"""Mesh axis over which the tokens of a sequence are sharded, and inside attention the heads instead."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AxisRules:
    """Mesh axes of every logical axis.

    An axis that does not divide a dimension, or that shards an earlier dimension of the same array, is left out.

    Attributes:
      embed: the hidden size, one side of every matrix: FSDP, whose shards the ranks of the context axis divide
        further, and pipeline stages where they do not divide the layers evenly.
      wide: feed-forward widths, the vocabulary, and heads as inputs: tensor parallelism.
      heads: heads as outputs: tensor and context parallelism.
      latent: outputs of the down-projections and of routers.
      expert: routed experts.
      expert_width: the inner width of routed experts.
      layers: stacked layers.
    """

    embed: tuple[str, ...] = ("fsdp", CONTEXT, "stage")
    wide: tuple[str, ...] = ("tensor",)
    heads: tuple[str, ...] = ("tensor", CONTEXT)
    latent: tuple[str, ...] = ()
    expert: tuple[str, ...] = ("expert",)
    expert_width: tuple[str, ...] = ("tensor",)
    layers: tuple[str, ...] = ("stage",)


ZERO = AxisRules(
    embed=("fsdp", CONTEXT, "stage", "data"),
    wide=("tensor", "expert"),
    heads=("tensor", CONTEXT, "expert"),
    latent=("expert",),
)
"""Rules of optimizer state that is sharded over the replicas of its parameters too (ZeRO-1)."""

WITHIN_A_STAGE = AxisRules(embed=("fsdp", CONTEXT), layers=())
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


def weight_axes(
    shape: ParameterShape, mesh: Mesh | AbstractMesh, rules: AxisRules = WITHIN_A_STAGE
) -> tuple[MeshAxes, ...]:
    """Returns the mesh axes of every dimension of a layer's weight, by default where a stage computes with it."""
    spec = _spec(shape.axes, shape.shape, mesh, rules)
    return (*spec, *[None] * (len(shape.shape) - len(spec)))


def gathered_dimension(shape: ParameterShape, axes: Sequence[MeshAxes]) -> int | None:
    """Returns the dimension of a layer's weight whose shards are all-gathered for products; None if there is none.

    Args:
      axes: those of `weight_axes`.
    """
    names = zip(shape.axes, axes, strict=False)  # a parameter that every device holds whole names no axes
    return next((dimension for dimension, (name, over) in enumerate(names) if name == "embed" and over), None)


def shardings(tree: Tree, mesh: Mesh, rules: AxisRules | None = None) -> Tree:
    """Returns the NamedSharding of each leaf of `tree`, as `parameter_specs` has its PartitionSpec."""
    specs = parameter_specs(tree, mesh, rules)
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec)
    )


def token_axes(mesh: Mesh | AbstractMesh, batch: Sequence[int]) -> tuple[MeshAxes, ...]:
    """Returns the mesh axes of the batch dimensions of an array: its sequences, their tokens, and any others.

    Args:
      batch: sizes of the dimensions. Tokens are not sharded where the context axis does not divide their number.
    """
    ranks = mesh.shape[CONTEXT]
    tokens = [CONTEXT if ranks > 1 and size % ranks == 0 else None for size in batch[1:2]]
    return (BATCH_AXES, *tokens, *[None] * len(batch[2:]))


def batch_spec(leading: int = 0) -> PartitionSpec:
    """Returns the PartitionSpec of a batch [..., B, T+1] with that many dimensions before B.

    Every rank of the context axis has all tokens, of which each layer takes its own: so inputs and targets, which are
    shifted against each other, need no exchange.
    """
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
