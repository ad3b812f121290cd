"""Functions of one rank, run on every rank of a mesh: under a plain program, or inside one that is a rank's already."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Set
from typing import Any

import jax
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from dsv3_jax.sharding.rules import BATCH_AXES


def on_every_rank(mesh: Mesh, function: Callable[..., Any], *, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`jax.shard_map` over every axis of the mesh that no `shard_map` around it has taken already.

    A pipeline takes the stage axis and those of the batch: inside it arrays are a rank's own parts along these.
    """
    around = jax.sharding.get_abstract_mesh()
    taken = set(around.manual_axes)
    left = set(mesh.axis_names) - taken
    if not left:
        return function
    in_specs, out_specs = (
        jax.tree.map(lambda spec: without_axes(spec, taken), specs, is_leaf=_is_spec) for specs in (in_specs, out_specs)
    )
    return jax.shard_map(
        function,
        mesh=around if taken else mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=left,
        check_vma=False,
    )


def without_axes(spec: PartitionSpec, axes: Set[str]) -> PartitionSpec:
    """The spec of what is left when arrays are parts along `axes` already."""
    return PartitionSpec(*[tuple(axis for axis in axes_of(entry) if axis not in axes) or None for entry in spec])


def axes_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Mesh axes of one dimension of a PartitionSpec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else entry


@dataclasses.dataclass(frozen=True)
class SumOnRanks:
    """Sums over the whole batch, of values that are sums over a rank's part of it where the batch axes are taken.

    Every rank has the sum then; of a loss that is made of it each must take its share, one part of as many as ranks.
    """

    def __call__(self, x: Array) -> Array:
        taken = jax.sharding.get_abstract_mesh().manual_axes
        return lax.psum(x, BATCH_AXES) if set(BATCH_AXES) <= set(taken) else x


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, PartitionSpec)
