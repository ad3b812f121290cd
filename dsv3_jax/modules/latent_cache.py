"""The cache of decoding: MLA's compressed latents and the shared rotary key, nothing per head (section 2.1.1).

For each layer, sequence and position it holds c^KV after its norm and k^R after its rotation: 512 + 64 numbers per
token and layer at the 671B model's sizes. The layer axis has the main model's layers and then, if the cache was made
with them, the MTP blocks.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class LatentCache(Protocol):
    """The operations that attention needs of a cache, whatever its layout in memory."""

    @property
    def block_length(self) -> int:
        """Number of positions that `read` returns."""
        ...

    @property
    def blocks(self) -> int:
        """Number of blocks of positions that the cache has room for."""
        ...

    def write(
        self,
        layer: Int[Array, ""] | int,
        positions: Int[Array, "B T"],
        latent: Float[Array, "B T kv_rank"],
        rope_key: Float[Array, "B T rope"],
    ) -> Self:
        """Returns the cache with new entries of one layer; negative positions and those past its end are dropped."""
        ...

    def read(
        self, layer: Int[Array, ""] | int, block: Int[Array, ""] | int, dtype: jnp.dtype
    ) -> tuple[Float[Array, "B S kv_rank"], Float[Array, "B S rope"]]:
        """Returns the latents and rotary keys of positions block * S .. (block + 1) * S - 1 of every sequence."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseCache:
    """A cache in which every sequence has the same number of consecutive positions."""

    latent: Float[Array, "L B S kv_rank"]
    rope_key: Float[Array, "L B S rope"]

    @classmethod
    def empty(cls, layers: int, batch: int, length: int, kv_rank: int, rope_width: int, dtype: jnp.dtype) -> DenseCache:
        """Returns a cache of zeros for `length` positions."""
        return cls(
            latent=jnp.zeros((layers, batch, length, kv_rank), dtype),
            rope_key=jnp.zeros((layers, batch, length, rope_width), dtype),
        )

    @property
    def block_length(self) -> int:
        """The whole length: it is read in one block."""
        return self.latent.shape[2]

    @property
    def blocks(self) -> int:
        """One block."""
        return 1

    def write(
        self,
        layer: Int[Array, ""] | int,
        positions: Int[Array, "B T"],
        latent: Float[Array, "B T kv_rank"],
        rope_key: Float[Array, "B T rope"],
    ) -> DenseCache:
        """Returns the cache with new entries of one layer; negative positions and those past its end are dropped."""
        rows = jnp.arange(positions.shape[0])[:, None]
        index = (layer, rows, jnp.where(positions < 0, self.block_length, positions))
        return DenseCache(
            latent=self.latent.at[index].set(latent.astype(self.latent.dtype), mode="drop"),
            rope_key=self.rope_key.at[index].set(rope_key.astype(self.rope_key.dtype), mode="drop"),
        )

    def read(
        self, layer: Int[Array, ""] | int, block: Int[Array, ""] | int, dtype: jnp.dtype
    ) -> tuple[Float[Array, "B S kv_rank"], Float[Array, "B S rope"]]:
        """Returns all entries of a layer."""
        del block
        return self.latent[layer].astype(dtype), self.rope_key[layer].astype(dtype)
