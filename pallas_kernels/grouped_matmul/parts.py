"""Finds the rows of each group where rows come in several parts, each sorted by group."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


class TilesByGroup(NamedTuple):
    """The tiles of the rows of all parts, which are counted through.

    Attributes:
      order: the tiles of the first group in all parts, then those of the second; tiles without a group come last.
      counts: how many tiles each group has.
    """

    order: Int[Array, " tiles"]
    counts: Int[Array, " G"]

    @classmethod
    def of(cls, group_sizes: Int[Array, "P G"], rows: int, tile: int) -> TilesByGroup:
        """Returns the tiles of `tile` rows; parts have `rows` rows, and the sizes are multiples of a tile."""
        tiles = group_sizes.astype(jnp.int32) // tile
        ends, at = jnp.cumsum(tiles, axis=1), jnp.arange(rows // tile, dtype=jnp.int32)
        group = jax.vmap(lambda ends: jnp.searchsorted(ends, at, side="right"))(ends)
        return cls(jnp.argsort(group.reshape(-1), stable=True).astype(jnp.int32), jnp.sum(tiles, axis=0))
