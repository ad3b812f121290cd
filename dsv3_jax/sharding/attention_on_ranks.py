"""Attention on a mesh: every rank attends within its own sequences, for its own heads."""

from __future__ import annotations

from collections.abc import Callable

from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from dsv3_jax.sharding.ranks import on_every_rank
from dsv3_jax.sharding.rules import BATCH_AXES


def attend_on_ranks(
    mesh: Mesh,
    attention: Callable[..., Array],
    queries: Float[Array, "B T H qk"],
    keys: Float[Array, "B T H c"],
    values: Float[Array, "B T H v"],
    shared_keys: Float[Array, "B T r"],
    segment_ids: Int[Array, "B T"] | None,
) -> Float[Array, "B T H v"]:
    """Returns attention(queries, keys, values, shared_keys, segment_ids=segment_ids).

    Heads are sharded over the tensor axis where it divides them; ranks along it compute all heads otherwise. The
    gradient of `shared_keys` is summed over the ranks' heads.
    """
    batch, heads = PartitionSpec(BATCH_AXES), _of_heads(mesh, queries.shape[2])

    def on_a_rank(queries: Array, keys: Array, values: Array, shared_keys: Array, segment_ids: Array | None) -> Array:
        return attention(queries, keys, values, shared_keys, segment_ids=segment_ids)

    return on_every_rank(mesh, on_a_rank, in_specs=(heads, heads, heads, batch, batch), out_specs=heads)(
        queries, keys, values, shared_keys, segment_ids
    )


def attend_to_pages_on_ranks(
    mesh: Mesh,
    attention: Callable[..., Array],
    queries: Float[Array, "B T H c"],
    rope_queries: Float[Array, "B T H r"],
    latents: Float[Array, "P page c"],
    rope_keys: Float[Array, "P page r"],
    table: Int[Array, "B N"],
    positions: Int[Array, "B T"],
) -> Float[Array, "B T H c"]:
    """Returns attention(queries, rope_queries, latents, rope_keys, table, positions).

    Every rank has all pages. Heads are sharded as in `attend_on_ranks`.
    """
    batch, heads, whole = PartitionSpec(BATCH_AXES), _of_heads(mesh, queries.shape[2]), PartitionSpec()
    specs = (heads, heads, whole, whole, batch, batch)
    return on_every_rank(mesh, attention, in_specs=specs, out_specs=heads)(
        queries, rope_queries, latents, rope_keys, table, positions
    )


def _of_heads(mesh: Mesh, heads: int) -> PartitionSpec:
    """Returns the PartitionSpec of an array [B, T, H, ...]."""
    divides = heads % mesh.shape["tensor"] == 0
    return PartitionSpec(BATCH_AXES, None, "tensor") if divides else PartitionSpec(BATCH_AXES)
