"""Moves weights from the training state to pipeline stages, and gradients back (report section 3.2.1).

The state shards a stack of MoE layers over the stage axis: by layers if all stages hold equally many, else along the
hidden size. All other weights are needed by every stage, and are sharded along the hidden size too. A rank's program
begins with an exchange, in which each rank sends every stage its shards of that stage's layers. It ends with the
opposite exchange of gradients. So no rank ever holds all layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from dsv3_jax.pipeline.executor import AXIS
from dsv3_jax.sharding.ranks import axes_of, without_axes
from dsv3_jax.sharding.rules import BATCH_AXES, AxisRules, parameter_specs, rules_over_stages

Tree = Any
"""A pytree of arrays, of their shapes, or of `StageWeightLayout`s."""

_TENSOR_ONLY = AxisRules(embed=(), latent=(), expert=(), layers=())


@dataclasses.dataclass(frozen=True)
class StageWeightLayout:
    """Where one weight is, in the state and while a stage works with it.

    Attributes:
      spec: the sharding in the state, along the axes that are manual in a rank's program.
      stage_dimension: the dimension that is sharded over the stage axis; None if every stage has all of it.
      replicas: batch axes whose ranks have the same shard.
      automatic: the sharding that the compiler keeps up inside a rank's program, along the axes it is left.
    """

    spec: PartitionSpec
    stage_dimension: int | None
    replicas: tuple[str, ...]
    automatic: PartitionSpec


ON_ALL_RANKS = StageWeightLayout(PartitionSpec(), None, (), PartitionSpec())
"""The layout of an array that every rank has whole."""


def manual_axes(mesh: Mesh) -> set[str]:
    """Returns the axes along which a rank's program has its own shards; a tensor axis is left to the compiler."""
    return {AXIS, *BATCH_AXES} | ({"tensor"} if mesh.shape["tensor"] == 1 else set())


def weight_layouts(params: Tree, mesh: Mesh, layers: Sequence[int]) -> Tree:
    """Returns a `StageWeightLayout` for every leaf.

    Args:
      params: all parameters of the model, as arrays or as shapes.
      layers: how many MoE layers each stage holds.
    """

    def layout(spec: PartitionSpec, automatic: PartitionSpec) -> StageWeightLayout:
        spec = without_axes(spec, set(mesh.shape) - manual_axes(mesh))
        axes = [axes_of(entry) for entry in spec]
        stage_dimension = next((dimension for dimension, names in enumerate(axes) if AXIS in names), None)
        sharded = {name for names in axes for name in names}
        return StageWeightLayout(
            spec, stage_dimension, tuple(axis for axis in BATCH_AXES if axis not in sharded), automatic
        )

    specs = parameter_specs(params, mesh, rules_over_stages(layers))
    automatic = parameter_specs(params, mesh, _TENSOR_ONLY)
    return jax.tree.map(layout, specs, automatic, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))


def specs_of(layouts: Tree) -> Tree:
    """Returns the `spec` of every layout."""
    return jax.tree.map(lambda layout: layout.spec, layouts)


def keep_automatic(tree: Tree, layouts: Tree, mesh: Mesh) -> Tree:
    """Returns the arrays, sharded by the compiler as their layouts say. It works inside a rank's program."""
    if mesh.shape["tensor"] == 1:
        return tree
    return jax.tree.map(lambda leaf, layout: lax.with_sharding_constraint(leaf, layout.automatic), tree, layouts)


def to_stage(leaf: Array, layout: StageWeightLayout, layers: Sequence[int]) -> Array:
    """Returns the layers of a rank's own stage, in as many slots as the largest stage has layers.

    Args:
      leaf: this rank's shard of a stack of layers [L, ...].
    """
    if layout.stage_dimension == 0:
        return leaf
    leaf = pad_stages(leaf, layers)
    if layout.stage_dimension is not None:
        return lax.all_to_all(leaf, AXIS, split_axis=0, concat_axis=layout.stage_dimension, tiled=True)
    slots = max(layers)
    return lax.dynamic_slice_in_dim(leaf, lax.axis_index(AXIS) * slots, slots)


def from_stage(gradient: Array, layout: StageWeightLayout, layers: Sequence[int]) -> Array:
    """Returns this rank's shard of the gradient, summed over replicas: the inverse of `to_stage`."""
    if layout.stage_dimension is None:
        gradient = lax.all_gather(gradient, AXIS, axis=0, tiled=True)
    elif layout.stage_dimension != 0:
        gradient = lax.all_to_all(gradient, AXIS, split_axis=layout.stage_dimension, concat_axis=0, tiled=True)
    if layout.stage_dimension != 0:
        gradient = unpad_stages(gradient, layers)
    return lax.psum(gradient, layout.replicas)


def to_all_stages(leaf: Array, layout: StageWeightLayout) -> Array:
    """Returns the whole weight that every stage needs, all-gathered from the shards of the stage axis."""
    if layout.stage_dimension is None:
        return leaf
    return lax.all_gather(leaf, AXIS, axis=layout.stage_dimension, tiled=True)


def from_all_stages(gradient: Array, layout: StageWeightLayout) -> Array:
    """Returns this rank's shard of the gradient, summed over stages and replicas: the inverse of `to_all_stages`."""
    if layout.stage_dimension is None:
        return lax.psum(gradient, (AXIS, *layout.replicas))
    gradient = lax.psum_scatter(gradient, AXIS, scatter_dimension=layout.stage_dimension, tiled=True)
    return lax.psum(gradient, layout.replicas)


def with_opposite_stage(leaf: Array) -> Array:
    """Returns the slots of a rank's own stage, followed by those of the opposite rank's stage."""
    return jnp.concatenate([leaf, lax.ppermute(leaf, AXIS, _opposite())])


def add_opposite_stage(gradient: Array) -> Array:
    """Returns the sum over both ranks that hold a stage: the inverse of `with_opposite_stage`."""
    slots = gradient.shape[0] // 2
    return gradient[:slots] + lax.ppermute(gradient[slots:], AXIS, _opposite())


def _opposite() -> list[tuple[int, int]]:
    ranks = lax.axis_size(AXIS)
    return [(rank, ranks - 1 - rank) for rank in range(ranks)]


def pad_stages(leaf: Array, layers: Sequence[int]) -> Array:
    """Returns a stack [L, ...] with the layers of every stage padded to as many slots as the largest stage has layers.

    It takes slices, because the compiler cannot shard a gather of the same rows on a mesh of several axes.
    """
    slots, starts = max(layers), np.cumsum((0, *layers))
    if min(layers) == slots:
        return leaf
    rest = [(0, 0)] * (leaf.ndim - 1)
    parts = (leaf[start : start + n] for start, n in zip(starts, layers, strict=False))
    return jnp.concatenate([jnp.pad(part, ((0, slots - part.shape[0]), *rest)) for part in parts])


def unpad_stages(leaf: Array, layers: Sequence[int]) -> Array:
    """Returns the stack [L, ...] without the padding of `pad_stages`."""
    slots = max(layers)
    return jnp.concatenate([leaf[stage * slots : stage * slots + n] for stage, n in enumerate(layers)])
