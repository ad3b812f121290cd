"""Moves groups of rows of any size so that each starts at a multiple of a kernel's tile."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.quantize.quantized import TILE

# Kernels ask every group size to be a multiple of this: then no tile of a kernel, and no FP8 tile along the rows, holds
# rows of two groups.
ROW_ALIGNMENT = TILE


class Alignment(NamedTuple):
    """An aligned layout of M rows.

    Attributes:
      source: the row that each aligned row holds; M where it holds none.
      destination: the aligned row of each row; one past the end for rows that belong to no group.
      group_sizes: the sizes of the aligned groups.
    """

    source: Int[Array, " aligned"]
    destination: Int[Array, " M"]
    group_sizes: Int[Array, " G"]


def align(rows: int, group_sizes: Int[Array, " G"], granule: int) -> Alignment:
    """Returns the layout in which every group starts at a multiple of `granule`."""
    groups = group_sizes.shape[0]
    most = rows + min(groups, rows) * (granule - 1)
    aligned_rows = most // granule * granule
    sizes = -(-group_sizes // granule) * granule
    starts, aligned_starts = jnp.cumsum(group_sizes) - group_sizes, jnp.cumsum(sizes) - sizes

    group, offset, within = _locate(jnp.arange(aligned_rows), aligned_starts, group_sizes)
    source = jnp.where(within, starts[group] + offset, rows)
    group, offset, within = _locate(jnp.arange(rows), starts, group_sizes)
    destination = jnp.where(within, aligned_starts[group] + offset, aligned_rows)
    return Alignment(source, destination, sizes.astype(group_sizes.dtype))


def take_rows(x: Float[Array, "rows ..."], index: Int[Array, " wanted"]) -> Float[Array, "wanted ..."]:
    """Returns rows of `x`, and zeros where the index is past its end."""
    return x.at[index].get(mode="fill", fill_value=0)


def _locate(row, starts, sizes):
    """Returns the last group that starts at or before each row, the offset in it, and whether it holds the row."""
    group = jnp.searchsorted(starts, row, side="right") - 1
    offset = row - starts[group]
    return group, offset, offset < sizes[group]
