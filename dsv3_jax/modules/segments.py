"""Segment ids of packed rows: which tokens belong together, where each segment starts, and which tokens are targets.

Ids count from 1 and 0 marks padding. A negative id says that the token belongs to the segment of that number but is
read only: no loss asks the model to predict it (a prompt, for instance).
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int


def positions_in_segments(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Returns the position of each token in its own segment, int32 from 0."""
    numbers = jnp.abs(segment_ids)
    index = jnp.broadcast_to(jnp.arange(numbers.shape[1], dtype=jnp.int32), numbers.shape)
    starts = numbers != jnp.pad(numbers, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    return index - lax.cummax(jnp.where(starts, index, 0), axis=1)
