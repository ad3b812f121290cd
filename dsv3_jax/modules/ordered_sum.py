"""A sum whose order of additions is fixed by its definition, not chosen by the compiler."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def ordered_sum(x: Float[Array, "*batch n"]) -> Float[Array, " *batch"]:
    """Returns the sum over the last axis, the halves added to each other until one number is left.

    XLA adds the numbers of `jnp.sum` in an order that depends on how many rows there are. Decoding uses this sum where
    a row's result must be the same bits in every batch.
    """
    width = 1
    while width < x.shape[-1]:
        width *= 2
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x[..., 0]
