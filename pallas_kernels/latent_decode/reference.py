"""Defines absorbed decoding in plain jax.numpy: all pages of every sequence are gathered."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def decode(
    q_latent: Float[Array, "B T H c"],
    q_rope: Float[Array, "B T H r"],
    latents: Float[Array, "P page c"],
    rope_keys: Float[Array, "P page r"],
    table: Int[Array, "B N"],
    positions: Int[Array, "B T"],
    scale: float,
    first: int = 0,
) -> Float[Array, "B T H c"]:
    """Returns the attended latents; zeros for a query without visible entries. Operands as in `latent_decode`."""
    wide = jnp.promote_types(q_latent.dtype, jnp.float32)
    batch = table.shape[0]
    latent, rope = (
        x.at[table].get(mode="fill", fill_value=0).reshape(batch, -1, x.shape[-1]) for x in (latents, rope_keys)
    )
    latent, rope = latent.astype(wide), rope.astype(wide)  # a CPU has no products of bfloat16 summed in float32
    logits = jnp.einsum("bthc,bsc->bhts", q_latent.astype(wide), latent)
    logits += jnp.einsum("bthr,bsr->bhts", q_rope.astype(wide), rope)
    entry = jnp.arange(latent.shape[1])
    visible = (positions[:, None, :, None] >= entry) & (entry >= first)
    logits = jnp.where(visible, logits * scale, -jnp.inf)
    largest = jnp.maximum(logits.max(axis=-1, keepdims=True), jnp.finfo(wide).min)
    weights = jnp.where(visible, jnp.exp(logits - largest), 0)
    weights /= jnp.maximum(weights.sum(axis=-1, keepdims=True), jnp.finfo(wide).tiny)
    return jnp.einsum("bhts,bsc->bthc", weights, latent).astype(q_latent.dtype)
