"""Multi-token prediction (report section 2.2, Eq. 21-25).

Module k of D sees, at position i, the hidden state of depth k-1 and the embedding of token i+k, and predicts token
i+k+1. The embedding and the output head are the main model's.

The report writes the joined vector as [hidden; embedding]; the published projection matrices want the embedding
first, and so do we. The hidden state handed from depth to depth is the one after the module's own output norm, as
engines that speculate several tokens with the published module do.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dsv3_jax.config import ModelConfig
from dsv3_jax.modules.block import Block
from dsv3_jax.modules.linear import Linear
from dsv3_jax.modules.norm import RMSNorm
from dsv3_jax.precision import Precision


class MultiTokenModule(nnx.Module):
    """One depth of multi-token prediction, without the shared embedding and head."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, precision: Precision, rngs: nnx.Rngs):
        d, epsilon = config.hidden_size, config.rms_norm_eps
        make: dict[str, Any] = {"dtype": dtype, "precision": precision, "rngs": rngs}
        self.embedding_norm = RMSNorm(d, epsilon, dtype=dtype)
        self.hidden_norm = RMSNorm(d, epsilon, dtype=dtype)
        plain: dict[str, Any] = make | {
            "precision": precision.without_fp8
        }  # as published: the one linear map that is not FP8
        self.projection = Linear(d, 2 * d, scale=config.initializer_range, **plain)
        self.block = Block(config, moe=True, **make)
        self.output_norm = RMSNorm(d, epsilon, dtype=dtype)

    def join(self, hidden: Float[Array, "B T d"], embedded: Float[Array, "B T d"]) -> Float[Array, "B T d"]:
        """Eq. 21: M_k [RMSNorm(Emb(t_{i+k})); RMSNorm(h_i)], the block's input."""
        joined = jnp.concatenate([self.embedding_norm(embedded), self.hidden_norm(hidden)], axis=-1)
        return self.projection(joined)
