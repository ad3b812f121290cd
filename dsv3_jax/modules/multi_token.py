"""Multi-token prediction (report section 2.2, Eq. 21-23; the losses of Eq. 24-25 are in `dsv3_jax.training.losses`).

    h'^k_i = M_k [RMSNorm(h^{k-1}_i); RMSNorm(Emb(t_{i+k}))]      (21)
    h^k    = TRM_k(h'^k)                                          (22)
    P^k_{i+k+1} = OutHead(h^k_i)                                  (23)

Module k of D sees, at position i, the hidden state of depth k-1 and the embedding of token i+k, and predicts token
i+k+1. The embedding and the output head are the main model's.

The published projection matrices M_k multiply the embedding first and the hidden state second, in the other order than
Eq. 21, and so do we. The hidden state that depth k hands on is the one after the module's own output norm, as in the
engines that speculate several tokens with the published module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dsv3_jax.config import ModelConfig
from dsv3_jax.modules.block import Block
from dsv3_jax.modules.devices import Devices
from dsv3_jax.modules.linear import Linear
from dsv3_jax.modules.norm import RMSNorm
from dsv3_jax.precision import Precision


class MultiTokenModule(nnx.Module):
    """One depth of multi-token prediction, without the shared embedding and head."""

    def __init__(
        self, config: ModelConfig, *, dtype: jnp.dtype, precision: Precision, devices: Devices, rngs: nnx.Rngs
    ):
        d, epsilon = config.hidden_size, config.rms_norm_eps
        make: dict[str, Any] = {"dtype": dtype, "devices": devices, "rngs": rngs}
        self.embedding_norm = RMSNorm(d, epsilon, dtype=dtype)
        self.hidden_norm = RMSNorm(d, epsilon, dtype=dtype)
        # As published: the one linear map that is never FP8.
        plain = precision.without_fp8
        self.projection = Linear(d, 2 * d, ("latent", "embed"), scale=config.initializer_range, precision=plain, **make)
        self.block = Block(config, moe=True, precision=precision, **make)
        self.output_norm = RMSNorm(d, epsilon, dtype=dtype)

    def join(
        self,
        hidden: Float[Array, "B T d"],
        embedded: Float[Array, "B T d"],
        norm: Callable[[RMSNorm, Array], Array] = RMSNorm.__call__,
    ) -> Float[Array, "B T d"]:
        """Returns the block's input h'^k (Eq. 21) from h^{k-1} and the embeddings of the tokens k positions later."""
        joined = jnp.concatenate([norm(self.embedding_norm, embedded), norm(self.hidden_norm, hidden)], axis=-1)
        return self.projection(joined)
