"""The arrays of a call of absorbed decoding."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Operands(NamedTuple):
    """The arrays of a call, as `latent_decode` describes them; `scales` are those of the latents in e4m3, else None."""

    q_latent: Float[Array, "B T H c"]
    q_rope: Float[Array, "B T H r"]
    latents: Float[Array, "P page c"]
    rope_keys: Float[Array, "P page r"]
    table: Int[Array, "B N"]
    positions: Int[Array, "B T"]
    scales: Float[Array, "P page"] | None = None

    def rows(self, x: Float[Array, "B T H w"]) -> Float[Array, "B TH w"]:
        """Returns queries with one axis for tokens and heads."""
        return x.reshape(x.shape[0], -1, x.shape[-1])

    def last_entries(self) -> Int[Array, "B TH"]:
        """Returns the position of the last entry that each row of queries sees, -1 for none."""
        return jnp.repeat(self.positions.astype(jnp.int32), self.q_latent.shape[2], axis=1)
