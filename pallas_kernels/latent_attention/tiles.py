"""Ranges of tiles that hold visible pairs of a query and a key, and the mask inside of a tile."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Int

# No segment, and different, so that a tile of queries and one of keys with several segments each never compare equal.
SEVERAL_OF_QUERIES, SEVERAL_OF_KEYS = -(2**31), 1 - 2**31


def key_tiles(
    segment_ids: Int[Array, "B T"] | None, batch: int, length: int, queries: int, keys: int, causal: bool
) -> tuple[Int[Array, "B Q"], Int[Array, "B Q"]]:
    """Returns the first tile of `keys` keys that each tile of `queries` queries may see, and the one after the last.

    Two tiles are taken to share a segment where the ranges of their ids overlap: that includes every visible pair.
    """
    return _ranges(segment_ids, batch, length, queries, keys, "back" if causal else None)


def query_tiles(
    segment_ids: Int[Array, "B T"] | None, batch: int, length: int, keys: int, queries: int, causal: bool
) -> tuple[Int[Array, "B K"], Int[Array, "B K"]]:
    """Returns the first tile of `queries` queries that may see each tile of `keys` keys, and the one after the last."""
    return _ranges(segment_ids, batch, length, keys, queries, "ahead" if causal else None)


def one_segment(segment_ids: Int[Array, "B T"], size: int, otherwise: int) -> Int[Array, "B tiles"]:
    """Returns the segment of each tile of `size` positions that is within one, `otherwise` for any other tile."""
    low, high = _id_ranges(segment_ids, size)
    return jnp.where(low == high, low, otherwise)


def _ranges(segment_ids, batch, length, own, other, direction):
    """Returns first and end of the tiles of `other` positions for each tile of `own` positions.

    `direction`: whether only positions back from a tile's last or ahead of its first one count.
    """
    own_tiles, other_tiles = -(-length // own), -(-length // other)
    start = jnp.arange(own_tiles, dtype=jnp.int32) * own
    first, end = jnp.zeros_like(start), jnp.full_like(start, other_tiles)
    if direction == "back":
        end = jnp.minimum(-(-(start + own) // other), other_tiles)
    elif direction == "ahead":
        first = start // other
    first, end = (jnp.broadcast_to(x, (batch, own_tiles)) for x in (first, end))
    if segment_ids is None:
        return first, end
    (own_low, own_high), (low, high) = (_id_ranges(segment_ids, size) for size in (own, other))
    index = jnp.arange(other_tiles, dtype=jnp.int32)
    shared = (own_low[:, :, None] <= high[:, None, :]) & (low[:, None, :] <= own_high[:, :, None])
    shared &= (index >= first[..., None]) & (index < end[..., None])
    first = jnp.min(jnp.where(shared, index, other_tiles), axis=-1)
    return first, jnp.max(jnp.where(shared, index + 1, 0), axis=-1)


def _id_ranges(ids, size):
    ids = jnp.pad(ids.astype(jnp.int32), ((0, 0), (0, -ids.shape[1] % size)), mode="edge")
    ids = ids.reshape(ids.shape[0], -1, size)
    return ids.min(axis=-1), ids.max(axis=-1)
