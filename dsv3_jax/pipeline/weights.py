"""How weights get from where the state has them to the stages of a pipeline, and gradients back (report section 3.2.1).

The state cuts a stack of layers over the stages by layers where the stages hold equally many, else by the width of its
matrices; what every stage needs by width too. A stage's program begins by exchanging: every rank hands each stage its
part of that stage's layers. It ends with gradients handed back the same way, so that no rank ever holds all layers.
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
from dsv3_jax.sharding.rules import BATCH_AXES, parameter_specs, rules_over_stages

Tree = Any
"""A pytree of arrays, or of `Place`s."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where one weight lies.

    Attributes:
      spec: in the state, along the axes that a rank's program takes.
      cut: the dimension that lies on the stage axis; None where every stage has all.
      replicas: axes of the batch whose ranks have the same part.
    """

    spec: PartitionSpec
    cut: int | None
    replicas: tuple[str, ...]


def taken_axes(mesh: Mesh) -> set[str]:
    """Axes along which a rank's program has its own part of everything; the tensor axis is left to the compiler."""
    return {AXIS, *BATCH_AXES} | ({"tensor"} if mesh.shape["tensor"] == 1 else set())


def places(tree: Tree, mesh: Mesh, layers: Sequence[int]) -> Tree:
    """A `Place` for every leaf.

    Args:
      tree: parameters by their paths in the whole tree.
      layers: how many of the stacked layers each stage has.
    """

    def of(spec: PartitionSpec) -> Place:
        spec = without_axes(spec, set(mesh.axis_names) - taken_axes(mesh))
        axes = [axes_of(entry) for entry in spec]
        cut = next((dimension for dimension, names in enumerate(axes) if AXIS in names), None)
        on_one = {name for names in axes for name in names}
        return Place(spec, cut, tuple(axis for axis in BATCH_AXES if axis not in on_one))

    found = parameter_specs(tree, mesh, rules_over_stages(layers))
    return jax.tree.map(of, found, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))


def specs(tree_of_places: Tree) -> Tree:
    """Their specs."""
    return jax.tree.map(lambda place: place.spec, tree_of_places)


def to_stage(leaf: Array, place: Place, layers: Sequence[int]) -> Array:
    """A rank's part of a stack of layers [L, ...] becomes its own stage's layers, in as many places as any has."""
    if place.cut == 0:
        return leaf
    leaf = in_places(leaf, layers)
    if place.cut is not None:
        return lax.all_to_all(leaf, AXIS, split_axis=0, concat_axis=place.cut, tiled=True)
    room = max(layers)
    return lax.dynamic_slice_in_dim(leaf, lax.axis_index(AXIS) * room, room)


def from_stage(gradient: Array, place: Place, layers: Sequence[int]) -> Array:
    """The way back, and the sum over replicas."""
    if place.cut is None:
        gradient = lax.all_gather(gradient, AXIS, axis=0, tiled=True)
    elif place.cut != 0:
        gradient = lax.all_to_all(gradient, AXIS, split_axis=place.cut, concat_axis=0, tiled=True)
    if place.cut != 0:
        gradient = from_places(gradient, layers)
    return lax.psum(gradient, place.replicas)


def to_all_stages(leaf: Array, place: Place) -> Array:
    """A rank's part of what every stage has becomes all of it."""
    return leaf if place.cut is None else lax.all_gather(leaf, AXIS, axis=place.cut, tiled=True)


def from_all_stages(gradient: Array, place: Place) -> Array:
    """The way back: sums over stages and replicas."""
    if place.cut is None:
        return lax.psum(gradient, (AXIS, *place.replicas))
    gradient = lax.psum_scatter(gradient, AXIS, scatter_dimension=place.cut, tiled=True)
    return lax.psum(gradient, place.replicas)


def in_places(leaf: Array, layers: Sequence[int]) -> Array:
    """[L, ...] with every stage's layers at its places, of which each stage has as many as the fullest.

    Slices, not a gather with the places: the compiler cannot divide that gather on a mesh of several axes.
    """
    room, starts = max(layers), np.cumsum((0, *layers))
    if min(layers) == room:
        return leaf
    rest = [(0, 0)] * (leaf.ndim - 1)
    parts = (leaf[start : start + n] for start, n in zip(starts, layers, strict=False))
    return jnp.concatenate([jnp.pad(part, ((0, room - part.shape[0]), *rest)) for part in parts])


def from_places(leaf: Array, layers: Sequence[int]) -> Array:
    """The inverse of `in_places`."""
    room = max(layers)
    return jnp.concatenate([leaf[stage * room : stage * room + n] for stage, n in enumerate(layers)])
