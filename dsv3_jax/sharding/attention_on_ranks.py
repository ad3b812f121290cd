"""Attention on a mesh: every rank attends within its own sequences, for its own heads.

Along the context axis, over which the tokens of a sequence are sharded everywhere else, ranks have whole sequences here
and shards of the heads. All ranks therefore have equally much to compute under the causal mask. What they gather for it
are the latents of queries, keys and values (`linear_on_ranks`), and each sends the outputs of its heads to the ranks of
their tokens (as in DeepSpeed-Ulysses, arXiv:2309.14509, which sends queries, keys and values too).
"""

from __future__ import annotations

from collections.abc import Callable

from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from dsv3_jax.modules.attention_core import CoreAttention
from dsv3_jax.modules.parameter import ParameterShape
from dsv3_jax.precision import AttendedRows
from dsv3_jax.sharding.ranks import axes_of, on_every_rank
from dsv3_jax.sharding.rules import BATCH_AXES, CONTEXT, token_axes, weight_axes


def attend_on_ranks(
    mesh: Mesh,
    attention: CoreAttention,
    queries: Float[Array, "B T H qk"],
    keys: Float[Array, "B T H c"],
    values: Float[Array, "B T H v"],
    shared_keys: Float[Array, "B T r"],
    segment_ids: Int[Array, "B T"] | None,
) -> Float[Array, "B T H v"] | AttendedRows:
    """Returns attention(queries, keys, values, shared_keys, segment_ids).

    Heads are sharded over the tensor axis and the context axis where these divide them; ranks along an axis that does
    not compute all heads. The gradient of `shared_keys` is summed over the ranks' heads.
    """
    batch, heads = PartitionSpec(BATCH_AXES), _of_heads(mesh, queries.shape[2])
    tokens = token_axes(mesh, queries.shape[:2])
    gather_keys = CONTEXT in tokens
    scatter_tokens = gather_keys and CONTEXT in axes_of(heads[2])

    def on_a_rank(
        queries: Array, keys: Array, values: Array, shared_keys: Array, segment_ids: Array | None
    ) -> Array | AttendedRows:
        if gather_keys:
            shared_keys = lax.all_gather(shared_keys, CONTEXT, axis=1, tiled=True)
        attended = attention(queries, keys, values, shared_keys, segment_ids, to_linear=not scatter_tokens)
        return lax.all_to_all(attended, CONTEXT, 1, 2, tiled=True) if scatter_tokens else attended

    own_keys = PartitionSpec(*tokens)
    out = PartitionSpec(*tokens, *[axis for axis in axes_of(heads[2]) if axis != CONTEXT]) if scatter_tokens else heads
    return on_every_rank(mesh, on_a_rank, in_specs=(heads, heads, heads, own_keys, batch), out_specs=out)(
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
    """Returns the PartitionSpec of an array [B, T, H, ...] of whole sequences."""
    return PartitionSpec(BATCH_AXES, None, *weight_axes(ParameterShape((heads,), ("heads",)), mesh))
