"""Calls cuDNN's attention through jax, which takes one width for queries, keys and values."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.latent_attention.operands import Operands


def attention(x: Operands, scale: float, causal: bool) -> Float[Array, "B T H v"]:
    """Returns the attended values; the shared keys are repeated for the heads, and values are padded with zeros."""
    q, k, v, k_shared, _ = x
    if k_shared is not None:
        repeated = jnp.broadcast_to(k_shared[:, :, None], (*k.shape[:3], k_shared.shape[-1]))
        k = jnp.concatenate([k, repeated], axis=-1)
    padded = jnp.pad(v, [(0, 0)] * 3 + [(0, q.shape[-1] - v.shape[-1])])
    out = jax.nn.dot_product_attention(q, k, padded, scale=scale, is_causal=causal, implementation="cudnn")
    return out[..., : v.shape[-1]]
