"""The arrays of a call of training attention, and what its backward pass is given besides."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Float, Int


class Operands(NamedTuple):
    """The arrays of a call, as `latent_attention` describes them."""

    q: Float[Array, "B T H qk"]
    k: Float[Array, "B T H c"]
    v: Float[Array, "B T H v"]
    k_shared: Float[Array, "B T r"] | None
    segment_ids: Int[Array, "B T"] | None


class OfResult(NamedTuple):
    """What the backward pass is told of the forward pass's result.

    Attributes:
      gradient: of the attended values.
      log_sums: natural logarithms of the rows' sums of exponentials.
      mean: each row's sum of attended values times their gradients.
    """

    gradient: Float[Array, "B T H v"]
    log_sums: Float[Array, "B H T"]
    mean: Float[Array, "B H T"]
