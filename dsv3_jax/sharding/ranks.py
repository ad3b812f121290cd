"""Runs a function of one rank on every rank of a mesh, from a plain program or from one that is a rank's already."""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Any

import jax
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from dsv3_jax.sharding.rules import BATCH_AXES


def on_every_rank(mesh: Mesh, function: Callable[..., Any], *, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Returns `function` under a `jax.shard_map` over every axis of the mesh that is not manual already.

    A pipeline stage's program is manual over the stage axis and the batch axes: its arrays are a rank's own shards
    along these, and axes of the specs that are manual already are dropped.
    """
    around = jax.sharding.get_abstract_mesh()
    manual = set(around.manual_axes)
    left = set(mesh.axis_names) - manual
    if not left:
        return function
    in_specs, out_specs = (
        jax.tree.map(lambda spec: without_axes(spec, manual), specs, is_leaf=_is_spec)
        for specs in (in_specs, out_specs)
    )
    return jax.shard_map(
        function,
        mesh=around if manual else mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=left,
        check_vma=False,
    )


def without_axes(spec: PartitionSpec, axes: Set[str]) -> PartitionSpec:
    """Returns the spec without `axes`, along which arrays are a rank's own shards already."""
    return PartitionSpec(*[tuple(axis for axis in axes_of(entry) if axis not in axes) or None for entry in spec])


def axes_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Returns the mesh axes of one dimension of a PartitionSpec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else entry


def sum_over_batch(x: Array) -> Array:
    """Returns the sum over the whole batch, where `x` is a sum over a rank's own sequences or over the batch already.

    In a program that is manual over the batch axes, such as a pipeline stage, `x` covers this rank's sequences only.
    All ranks get the sum: a loss that contains it must count each rank's share of it, one part in the number of ranks.
    """
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return lax.psum(x, BATCH_AXES) if set(BATCH_AXES) <= set(manual) else x


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, PartitionSpec)
