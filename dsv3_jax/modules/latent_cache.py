"""The cache of decoding: MLA's compressed latents and the shared rotary key, nothing per head (section 2.1.1)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LatentCache:
    """Holds, for each layer, sequence and position, c^KV after its norm and k^R after its rotation.

    These are 512 + 64 numbers per token and layer at the 671B model's sizes. The layer axis has the main model's layers
    and then, if the cache was made with them, the MTP blocks.
    """

    latent: Float[Array, "L B S kv_rank"]
    rope_key: Float[Array, "L B S rope"]

    @classmethod
    def empty(
        cls, layers: int, batch: int, length: int, kv_rank: int, rope_width: int, dtype: jnp.dtype
    ) -> LatentCache:
        """Returns a cache of zeros for `length` positions."""
        return cls(
            latent=jnp.zeros((layers, batch, length, kv_rank), dtype),
            rope_key=jnp.zeros((layers, batch, length, rope_width), dtype),
        )

    def write(
        self,
        layer: Int[Array, ""] | int,
        positions: Int[Array, "B T"],
        latent: Float[Array, "B T kv_rank"],
        rope_key: Float[Array, "B T rope"],
    ) -> LatentCache:
        """Returns the cache with new entries of one layer; positions beyond its length are dropped."""
        rows = jnp.arange(positions.shape[0])[:, None]
        return LatentCache(
            latent=self.latent.at[layer, rows, positions].set(latent.astype(self.latent.dtype), mode="drop"),
            rope_key=self.rope_key.at[layer, rows, positions].set(rope_key.astype(self.rope_key.dtype), mode="drop"),
        )
