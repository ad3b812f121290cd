"""The SwiGLU feed-forward network: dense layers and shared experts (report section 2.1.2)."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dsv3_jax.modules.devices import Devices, OneDevice
from dsv3_jax.modules.linear import Linear
from dsv3_jax.precision import Precision, QuantizedRows, swiglu_linear


class FeedForward(nnx.Module):
    """Computes down(silu(gate x) * (up x)), gate and up in one product.

    Args:
      width: the inner width.
      scale: standard deviation of the initial weights.
      dtype, precision, devices: as for `Linear`.
    """

    def __init__(
        self,
        hidden_size: int,
        width: int,
        *,
        scale: float,
        dtype: jnp.dtype,
        precision: Precision,
        devices: Devices = OneDevice(),
        rngs: nnx.Rngs,
    ):
        make = {"scale": scale, "dtype": dtype, "precision": precision, "devices": devices, "rngs": rngs}
        self.gate_up = Linear((2, width), hidden_size, (None, "wide", "embed"), **make)
        self.down = Linear(hidden_size, width, ("embed", "wide"), **make)

    def __call__(self, x: Float[Array, "*batch d"] | QuantizedRows) -> Float[Array, "*batch d"]:
        """Maps each token's hidden state, in the recipe's dtype."""
        behind_swiglu = functools.partial(swiglu_linear, precision=self.down.precision)
        return self.down.multiply(behind_swiglu, self.gate_up(x), batch_axes=x.ndim - 1)
