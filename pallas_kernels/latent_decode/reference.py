"""Defines absorbed decoding in plain jax.numpy: all pages of every sequence are gathered."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.latent_decode.operands import Operands


def decode(x: Operands, scale: float, first: int = 0) -> Float[Array, "B T H c"]:
    """Returns the attended latents; zeros for a query without visible entries."""
    wide = jnp.promote_types(x.q_latent.dtype, jnp.float32)

    def gathered(entries):
        found = entries.at[x.table].get(mode="fill", fill_value=0).astype(wide)
        return found.reshape(found.shape[0], -1, *found.shape[3:])

    # A CPU has no products of bfloat16 summed in float32.
    latent, rope = gathered(x.latents), gathered(x.rope_keys)
    if x.scales is not None:
        latent *= gathered(x.scales)[..., None]
    logits = jnp.einsum("bthc,bsc->bhts", x.q_latent.astype(wide), latent)
    logits += jnp.einsum("bthr,bsr->bhts", x.q_rope.astype(wide), rope)
    entry = jnp.arange(latent.shape[1])
    visible = (x.positions[:, None, :, None] >= entry) & (entry >= first)
    logits = jnp.where(visible, logits * scale, -jnp.inf)
    largest = jnp.maximum(logits.max(axis=-1, keepdims=True), jnp.finfo(wide).min)
    weights = jnp.where(visible, jnp.exp(logits - largest), 0)
    weights /= jnp.maximum(weights.sum(axis=-1, keepdims=True), jnp.finfo(wide).tiny)
    return jnp.einsum("bhts,bsc->bthc", weights, latent).astype(x.q_latent.dtype)
