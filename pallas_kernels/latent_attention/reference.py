"""Defines attention in plain jax.numpy: softmax(scale * q kᵀ) v, with all logits in memory."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.latent_attention.operands import Operands


def attention(x: Operands, scale: float, causal: bool) -> tuple[Float[Array, "B T H v"], Float[Array, "B H T"]]:
    """Returns the attended values and the natural logarithm of each row's sum of exponentials, at least in float32."""
    q, k, v, k_shared, segment_ids = x
    wide = jnp.promote_types(q.dtype, jnp.float32)
    own, dtype = k.shape[-1], v.dtype
    q, k, v = (array.astype(wide) for array in (q, k, v))  # a CPU has no products of bfloat16 summed in float32
    logits = jnp.einsum("bqhc,bkhc->bhqk", q[..., :own], k)
    if k_shared is not None:
        logits += jnp.einsum("bqhc,bkc->bhqk", q[..., own:], k_shared.astype(wide))
    logits = jnp.where(visible(q.shape[1], segment_ids, causal), scale * logits, -jnp.inf)
    largest = logits.max(axis=-1, keepdims=True)
    weights = jnp.exp(logits - largest)
    total = weights.sum(axis=-1, keepdims=True)
    out = jnp.einsum("bhqk,bkhv->bqhv", weights / total, v)
    return out.astype(dtype), (largest + jnp.log(total))[..., 0]


def visible(length: int, segment_ids: Int[Array, "B T"] | None, causal: bool) -> Bool[Array, "B 1 T T"]:
    """Returns which keys (last axis) each query sees."""
    at = jnp.arange(length)
    seen = at[:, None] >= at[None, :] if causal else jnp.ones((length, length), bool)
    if segment_ids is None:
        return seen[None, None]
    return (seen & (segment_ids[:, :, None] == segment_ids[:, None, :]))[:, None]
