"""Causal softmax attention with expanded keys and values: softmax(scale * q k^T) v, logits and softmax in float32.

The queries of a short sequence are split into a few chunks, each of which multiplies only the keys before its end, so
that as little as half the products of the full square are computed; all weights are kept for the backward pass. A long
sequence is computed tile by tile (`tiled_attention`), so that the logits of at most one tile are held at a time. Where
there is a kernel for the device, `pallas_kernels.latent_attention` computes sequences of any length.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

import pallas_kernels
from dsv3_jax.errors import UserError
from dsv3_jax.modules.tiled_attention import largest_of_tiles, tiled_attention
from dsv3_jax.precision.attended import AttendedRows, KeptOutput
from dsv3_jax.precision.weight_product import product_over_rows
from pallas_kernels.device import target_platform

AttentionChoice = Literal["auto", "scan", "cudnn"]
"""What computes attention over whole sequences.

auto: a kernel of `pallas_kernels` where the device has one, else the scan.  scan: plain products, tile by tile.  cudnn:
cuDNN on an NVIDIA GPU, with values padded to the width of the keys; on other devices as auto.
"""

CHUNKS = 2  # of a short sequence: 3/4 of the square is computed, and the program stays small
LARGEST_CHUNK = 512  # queries; a tile of 512 x 512 logits of a head takes 1 MB in float32
CHUNK_MULTIPLE = 128  # chunks of a long sequence have the widths that matrix units like
KEPT_LENGTH = 1024  # sequences up to this length keep their weights for the backward pass


@dataclasses.dataclass(frozen=True)
class CoreAttention:
    """The attention of a layer, between the products with its weights.

    Attributes:
      scale, choice: as in `causal_attention`.
      kept: how kernels keep their output for the backward pass; None where they keep it as jax.vjp does.
    """

    scale: float
    choice: AttentionChoice
    kept: KeptOutput | None

    def __call__(
        self,
        queries: Float[Array, "B T H qk"],
        keys: Float[Array, "B T H c"],
        values: Float[Array, "B T H v"],
        shared_keys: Float[Array, "B T r"],
        segment_ids: Int[Array, "B T"] | None,
        *,
        to_linear: bool = True,
    ) -> Float[Array, "B T H v"] | AttendedRows:
        """Returns what `causal_attention` does, or the same kept already, where a kernel computes it.

        Args:
          to_linear: whether the next linear map gets the output as it is. Then one copy is kept for both.
        """
        keeps = to_linear and self.kept is not None and self.choice != "scan" and not _is_cudnn(self.choice)
        call: dict[str, Any] = {"scale": self.scale, "segment_ids": segment_ids}
        if keeps and pallas_kernels.has_attention_kernel(queries, keys, values):
            call |= {"k_shared": shared_keys, "keep": self.kept}
            return AttendedRows(*pallas_kernels.latent_attention_and_kept(queries, keys, values, **call))
        return causal_attention(queries, keys, values, shared_keys, choice=self.choice, **call)


def causal_attention(
    queries: Float[Array, "B T H qk"],
    keys: Float[Array, "B T H c"],
    values: Float[Array, "B T H v"],
    shared_keys: Float[Array, "B T r"] | None = None,
    *,
    scale: float,
    segment_ids: Int[Array, "B T"] | None = None,
    query_chunk: int | None = None,
    choice: AttentionChoice = "auto",
) -> Float[Array, "B T H v"]:
    """Computes attention of every position to itself and the positions before it (report Eq. 10).

    Args:
      queries, keys, values: arrays in the dtype of the computation; head widths of keys and values may differ.
      shared_keys: the last columns of every head's keys, MLA's rotary part.
      scale: multiplier of the logits.
      segment_ids: when given, positions attend only within equal ids.
      query_chunk: queries (in a long sequence also keys) computed at a time; chosen by the length unless given.
      choice: what computes it.

    Returns:
      The attended values, in the dtype of `values`.

    Raises:
      UserError: cuDNN is chosen on a GPU for arrays that it does not take.
    """
    cudnn = _is_cudnn(choice)
    if cudnn:
        _check_for_cudnn(queries, segment_ids)
    if cudnn or (choice != "scan" and pallas_kernels.has_attention_kernel(queries, keys, values)):
        return pallas_kernels.latent_attention(
            queries,
            keys,
            values,
            k_shared=shared_keys,
            scale=scale,
            segment_ids=segment_ids,
            implementation="cudnn" if cudnn else None,
        )
    if shared_keys is not None:
        keys = _with_shared(keys, shared_keys)
    length = queries.shape[1]
    if length > KEPT_LENGTH:
        chunk = query_chunk or even_chunk(length)
        return tiled_attention(queries, keys, values, segment_ids, scale, chunk)
    chunk = query_chunk or _short_chunk(length)
    parts = []
    for start in range(0, length, chunk):
        stop = min(start + chunk, length)
        segments = None if segment_ids is None else segment_ids[:, :stop]
        part = _attend(queries[:, start:stop], keys[:, :stop], values[:, :stop], segments, scale, start)
        parts.append(part)
    return jnp.concatenate(parts, axis=1)


def largest_logits(
    queries: Float[Array, "B T H qk"],
    keys: Float[Array, "B T H c"],
    shared_keys: Float[Array, "B T r"],
    *,
    scale: float,
    segment_ids: Int[Array, "B T"] | None,
    counted: Bool[Array, "B T"] | None,
) -> Float[Array, " H"]:
    """Returns the largest logit of every head over all pairs of a query and a key that it sees, at least 0.

    Logits are computed as in `causal_attention`, of which arguments are not said here; a program that holds both
    computes those of a short sequence once.

    Args:
      counted: True at tokens whose queries count; all do unless given.
    """
    keys = _with_shared(keys, shared_keys)
    counted = jnp.ones(queries.shape[:2], bool) if counted is None else counted
    length = queries.shape[1]
    if length > KEPT_LENGTH:
        return largest_of_tiles(queries, keys, segment_ids, counted, scale, even_chunk(length))
    largest, chunk = [], _short_chunk(length)
    for start in range(0, length, chunk):
        stop = min(start + chunk, length)
        segments = None if segment_ids is None else segment_ids[:, :stop]
        rows = _logits(queries[:, start:stop], keys[:, :stop], segments, scale=scale, start=start).max(axis=-1)
        largest.append(jnp.where(counted[:, None, start:stop], rows, 0.0).max(axis=(0, 2)))
    return jnp.maximum(jnp.max(jnp.stack(largest), axis=0), 0.0)


def _is_cudnn(choice: AttentionChoice) -> bool:
    return choice == "cudnn" and target_platform() in ("hopper", "gpu")


def _with_shared(keys: Float[Array, "B T H c"], shared_keys: Float[Array, "B T r"]) -> Float[Array, "B T H qk"]:
    repeated = jnp.broadcast_to(shared_keys[:, :, None, :], (*keys.shape[:-1], shared_keys.shape[-1]))
    return jnp.concatenate([keys, repeated], axis=-1)


def _short_chunk(length: int) -> int:
    """Returns the number of queries that are computed at a time in a short sequence."""
    return min(max(-(-length // CHUNKS), 16), LARGEST_CHUNK)


def even_chunk(length: int) -> int:
    """Returns the chunk of a long sequence: the largest, or less where that needs less padding (1,025 is 3 x 384)."""
    even = -(-length // -(-length // LARGEST_CHUNK))
    return -(-even // CHUNK_MULTIPLE) * CHUNK_MULTIPLE


def _check_for_cudnn(queries: Float[Array, "B T H qk"], segment_ids: Int[Array, "B T"] | None) -> None:
    if segment_ids is not None:
        raise UserError("attention 'cudnn' does not keep documents apart: choose attention 'auto'")
    if queries.dtype != jnp.bfloat16:
        raise UserError(f"attention 'cudnn' takes bfloat16, not {queries.dtype}: choose precision bfloat16 or fp8")


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(
    queries: Float[Array, "B Q H qk"],
    keys: Float[Array, "B S H qk"],
    values: Float[Array, "B S H v"],
    segment_ids: Int[Array, "B S"] | None,
    scale: float,
    start: int,
) -> Float[Array, "B Q H v"]:
    """Computes attention of the queries at positions start, start + 1, ... to the keys at positions 0 .. S-1."""
    return _attend_forward(queries, keys, values, segment_ids, scale, start)[0]


def _attend_forward(queries, keys, values, segment_ids, scale, start):
    """Keeps exp(logit - largest) in the dtype of the values. Dividing the output by its sums passes over less."""
    logits = _logits(queries, keys, segment_ids, scale=scale, start=start)
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True)).astype(values.dtype)
    sums = jnp.sum(weights, axis=-1, keepdims=True, dtype=logits.dtype)
    out = jnp.einsum("bhqs,bshv->bhqv", weights, values, preferred_element_type=logits.dtype) / sums
    return jnp.swapaxes(out, 1, 2).astype(values.dtype), (queries, keys, values, weights, sums, out)


def _attend_backward(scale, start, residuals, out_bar):
    """Returns the gradients; what a softmax subtracts, sum_s P_s dL/dP_s, is the output times its own gradient."""
    queries, keys, values, weights, sums, out = residuals
    # Without the barrier XLA would keep the float32 copy that the forward pass makes of the weights to sum them.
    weights = lax.optimization_barrier(weights)
    dtype, wide = values.dtype, sums.dtype
    out_bar = jnp.swapaxes(out_bar, 1, 2).astype(wide) / sums
    subtracted = jnp.sum(out_bar * out, axis=-1, keepdims=True)
    out_bar = out_bar.astype(dtype)
    queries, keys, values = (jnp.swapaxes(x, 1, 2) for x in (queries, keys, values))
    weights_bar = jnp.einsum("bhqv,bhsv->bhqs", out_bar, values, preferred_element_type=wide)
    logits_bar = (weights.astype(wide) * (weights_bar - subtracted)).astype(dtype)
    queries_bar = jnp.einsum("bhqs,bhsc->bhqc", logits_bar, keys) * scale
    keys_bar = product_over_rows(logits_bar, queries, wide) * scale
    values_bar = product_over_rows(weights, out_bar, wide)
    return *(jnp.swapaxes(x, 1, 2).astype(dtype) for x in (queries_bar, keys_bar, values_bar)), None


_attend.defvjp(_attend_forward, _attend_backward)


def _logits(
    queries: Float[Array, "B Q H qk"],
    keys: Float[Array, "B S H qk"],
    segment_ids: Int[Array, "B S"] | None,
    *,
    scale: float,
    start: int,
) -> Float[Array, "B H Q S"]:
    """Returns the logits of the same queries and keys, -inf where a key is not visible to a query."""
    wide = jnp.promote_types(queries.dtype, jnp.float32)
    logits = jnp.einsum("bqhc,bshc->bhqs", queries, keys, preferred_element_type=wide) * scale
    query_count, key_count = logits.shape[-2:]
    query_at = start + jnp.arange(query_count)[:, None]
    visible = query_at >= jnp.arange(key_count)[None, :]
    if segment_ids is not None:
        own = segment_ids[:, start : start + query_count]
        visible = visible & (own[:, None, :, None] == segment_ids[:, None, None, :])
    # Added, not selected: XLA computes the product, the sum and the softmax of a row as one operation on a CPU.
    return logits + jnp.where(visible, 0.0, -jnp.inf).astype(wide)
