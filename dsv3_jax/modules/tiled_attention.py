"""Causal softmax attention of long sequences, tile by tile: softmax(scale * q k^T) v without whole rows of logits.

Queries and keys are split into n chunks each, and one loop visits the n (n + 1) / 2 tiles on and below the diagonal.
The softmax is accumulated (Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"): for each row the
loop carries the largest logit so far and sums of exponentials relative to it, which are rescaled when a larger logit
appears. The backward pass is a second loop that recomputes each tile's weights from q, k and the logarithm of the row's
sum (Dao et al. 2022, "FlashAttention"). Program size and working memory are therefore those of one tile at any length.

Both loops have a trip count that is known when compiling. Accelerators then run them without asking the host after each
tile, and the operations of the compiled program can be counted.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def tiled_attention(
    queries: Float[Array, "B T H qk"],
    keys: Float[Array, "B T H qk"],
    values: Float[Array, "B T H v"],
    segment_ids: Int[Array, "B T"] | None,
    scale: float,
    chunk: int,
) -> Float[Array, "B T H v"]:
    """Computes attention of every position to itself and the positions before it (report Eq. 10).

    Args:
      queries, keys, values: arrays in the dtype of the computation. Logits, exponentials and sums are at least float32;
        exponentials and gradients of logits are rounded to the computation's dtype for their products.
      segment_ids: when given, positions attend only within equal ids.
      scale: multiplier of the logits.
      chunk: number of queries, and of keys, of a tile.

    Returns:
      The attended values, in the dtype of `values`.
    """
    return _forward(queries, keys, values, segment_ids, scale, chunk)[0]


def _forward(
    queries: Array, keys: Array, values: Array, segment_ids: Array | None, scale: float, chunk: int
) -> tuple[Array, tuple[Array | None, ...]]:
    """Returns the output, and what the backward pass needs: arguments, output and logarithms of sums [n, B, H, chunk].

    The loop visits the tiles row by row.
    """
    wide = jnp.promote_types(queries.dtype, jnp.float32)
    length, heads = queries.shape[1:3]
    q, k, v = (_split(x, chunk) for x in (queries, keys, values))
    ids = None if segment_ids is None else _split_ids(segment_ids, chunk)
    n, batch = q.shape[:2]
    # Not -inf, because -inf - (-inf) is NaN in a row without visible keys so far: its weights are exactly zero.
    lowest = jnp.finfo(wide).min
    row = (batch, heads, chunk)

    def tile(state, _):
        (i, j), (largest, total, sums), (out, log_sums) = state
        first = j == 0
        largest, total, sums = (
            jnp.where(first, start, x) for start, x in ((lowest, largest), (0.0, total), (0.0, sums))
        )
        logits = _logits(_at(q, i), _at(k, j), ids, i, j, scale)
        new_largest = jnp.maximum(largest, logits.max(axis=-1))
        weights = jnp.exp(logits - new_largest[..., None])
        shrink = jnp.exp(largest - new_largest)
        total = total * shrink + weights.sum(axis=-1)
        sums = sums * shrink[..., None] + _product("bhqk,bhkv->bhqv", weights.astype(v.dtype), _at(v, j), wide)
        # Written after every tile, because a write costs less than a branch. The tile on the diagonal is the last of a
        # row. Before it a query may have had no visible key, and its result is 0 / 0 until then.
        out = _put(out, i, sums / total[..., None])
        log_sums = _put(log_sums, i, new_largest + jnp.log(total))
        at_diagonal = j == i
        following = (i + at_diagonal, jnp.where(at_diagonal, 0, j + 1))
        return (following, (new_largest, total, sums), (out, log_sums)), None

    zeros = functools.partial(jnp.zeros_like, queries)  # with the queries' manual mesh axes, if there are any
    running = (zeros(wide, row), zeros(wide, row), zeros(wide, (*row, v.shape[-1])))
    results = (zeros(v.dtype, v.shape), zeros(wide, (n, *row)))
    start = ((jnp.int32(0), jnp.int32(0)), running, results)
    (_, _, (out, log_sums)), _ = lax.scan(tile, start, None, length=n * (n + 1) // 2)
    attended = _join(out, length)
    return attended, (queries, keys, values, segment_ids, attended, log_sums)


def _backward(scale: float, chunk: int, kept: tuple[Any, ...], gradient: Array) -> tuple[Array | None, ...]:
    """Returns the gradients of queries, keys and values, in their dtypes, each accumulated in the wide one.

    With weights p and their gradient dp = do v^T, the gradient of the logits is p (dp - sum(p dp)), and a row's
    sum(p dp) is o do. The loop visits the tiles column by column: it carries the gradients of a column's keys and
    values, and adds to the gradients of each row's queries.
    """
    queries, keys, values, segment_ids, attended, log_sums = kept
    wide = log_sums.dtype
    length = queries.shape[1]
    q, k, v, o, do = (_split(x, chunk) for x in (queries, keys, values, attended, gradient))
    ids = None if segment_ids is None else _split_ids(segment_ids, chunk)
    n = q.shape[0]
    mean_gradient = jnp.sum(o.astype(wide) * do.astype(wide), axis=-1)

    def tile(state, _):
        (i, j), (dk, dv), (all_dq, all_dk, all_dv) = state
        dk, dv = (jnp.where(i == j, 0.0, x) for x in (dk, dv))
        qi, doi, kj, vj = _at(q, i), _at(do, i), _at(k, j), _at(v, j)
        weights = jnp.exp(_logits(qi, kj, ids, i, j, scale) - _at(log_sums, i)[..., None])
        dweights = _product("bhqv,bhkv->bhqk", doi, vj, wide)
        dlogits = (scale * weights * (dweights - _at(mean_gradient, i)[..., None])).astype(q.dtype)
        dv += _product("bhqk,bhqv->bhkv", weights.astype(v.dtype), doi, wide)
        dk += _product("bhqk,bhqc->bhkc", dlogits, qi, wide)
        all_dq = _put(all_dq, i, _at(all_dq, i) + _product("bhqk,bhkc->bhqc", dlogits, kj, wide))
        all_dk, all_dv = _put(all_dk, j, dk), _put(all_dv, j, dv)
        at_end = i == n - 1
        following = (jnp.where(at_end, j + 1, i + 1), j + at_end)
        return (following, (dk, dv), (all_dq, all_dk, all_dv)), None

    zeros = functools.partial(jnp.zeros_like, queries)
    column = (zeros(wide, k.shape[1:]), zeros(wide, v.shape[1:]))
    results = (zeros(wide, q.shape), zeros(k.dtype, k.shape), zeros(v.dtype, v.shape))
    start = ((jnp.int32(0), jnp.int32(0)), column, results)
    (_, _, (dq, dk, dv)), _ = lax.scan(tile, start, None, length=n * (n + 1) // 2)
    return _join(dq.astype(q.dtype), length), _join(dk, length), _join(dv, length), None


tiled_attention.defvjp(_forward, _backward)


def largest_of_tiles(
    queries: Float[Array, "B T H qk"],
    keys: Float[Array, "B T H qk"],
    segment_ids: Int[Array, "B T"] | None,
    counted: Bool[Array, "B T"],
    scale: float,
    chunk: int,
) -> Float[Array, " H"]:
    """Returns the largest logit of every head over the visible keys of the counted queries, at least 0.

    Other arguments as of `tiled_attention`.
    """
    q, k = (_split(x, chunk) for x in (queries, keys))
    ids = None if segment_ids is None else _split_ids(segment_ids, chunk)
    counts = _split_ids(counted, chunk)
    n = q.shape[0]

    def tile(state, _):
        (i, j), largest = state
        rows = _logits(_at(q, i), _at(k, j), ids, i, j, scale).max(axis=-1)
        largest = jnp.maximum(largest, jnp.where(_at(counts, i)[:, None], rows, 0.0).max(axis=(0, 2)))
        at_diagonal = j == i
        return ((i + at_diagonal, jnp.where(at_diagonal, 0, j + 1)), largest), None

    zeros = jnp.zeros_like(queries, jnp.promote_types(queries.dtype, jnp.float32), (queries.shape[2],))
    (_, largest), _ = lax.scan(tile, ((jnp.int32(0), jnp.int32(0)), zeros), None, length=n * (n + 1) // 2)
    return largest


def _at(chunks: Array, index: Int[Array, ""]) -> Array:
    """Returns one chunk. A slice, because an index would be checked for being negative or too large."""
    return lax.dynamic_index_in_dim(chunks, index, keepdims=False)


def _put(chunks: Array, index: Int[Array, ""], chunk: Array) -> Array:
    """Replaces one chunk in place."""
    return lax.dynamic_update_index_in_dim(chunks, chunk.astype(chunks.dtype), index, 0)


def _product(equation: str, a: Array, b: Array, wide: jnp.dtype) -> Array:
    """Returns an einsum that is summed in the wide dtype."""
    return jnp.einsum(equation, a, b, preferred_element_type=wide)


def _logits(
    q: Float[Array, "B H Q qk"],
    k: Float[Array, "B H K qk"],
    ids: Int[Array, "n B Q"] | None,
    i: Int[Array, ""],
    j: Int[Array, ""],
    scale: float,
) -> Float[Array, "B H Q K"]:
    """Returns the logits of tile (i, j), -inf where a key is not visible to a query."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    logits = _product("bhqc,bhkc->bhqk", q, k, wide) * scale
    at = jnp.arange(q.shape[2], dtype=jnp.int32)
    visible: Bool[Array, "..."] = (i - j) * q.shape[2] + at[:, None] >= at[None, :]
    if ids is not None:
        visible = visible & (_at(ids, i)[:, None, :, None] == _at(ids, j)[:, None, None, :])
    # Added instead of selected, because XLA would keep a whole tile of -inf in memory for a select.
    return logits + jnp.where(visible, 0.0, -jnp.inf).astype(wide)


def _split(x: Float[Array, "B T H c"], chunk: int) -> Float[Array, "n B H chunk c"]:
    """Splits positions into chunks that are contiguous in memory, padded with zeros after the last position.

    The padding comes after every real query, which therefore does not see it. As queries, padded positions see at least
    themselves and return no gradient.
    """
    batch, length, heads, width = x.shape
    n = -(-length // chunk)
    x = jnp.pad(x, ((0, 0), (0, n * chunk - length), (0, 0), (0, 0)))
    return x.reshape(batch, n, chunk, heads, width).transpose(1, 0, 3, 2, 4)


def _split_ids(ids: Shaped[Array, "B T"], chunk: int) -> Shaped[Array, "n B chunk"]:
    """Splits numbers of positions into chunks, padded with zeros."""
    batch, length = ids.shape
    n = -(-length // chunk)
    return jnp.pad(ids, ((0, 0), (0, n * chunk - length))).reshape(batch, n, chunk).transpose(1, 0, 2)


def _join(x: Float[Array, "n B H chunk c"], length: int) -> Float[Array, "B T H c"]:
    """Joins the chunks of `_split` and drops the padding."""
    n, batch, heads, chunk, width = x.shape
    return x.transpose(1, 0, 3, 2, 4).reshape(batch, n * chunk, heads, width)[:, :length]
