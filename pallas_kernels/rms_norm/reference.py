"""Defines RMSNorm with the quantization behind it in plain jax.numpy.

    r  = 1 / sqrt(mean(x^2) + epsilon)            of each row
    y  = x r w                                    rounded to the dtype of x, then quantized
    x' = r (w y' - x r mean(w y' x r)) + z        y' is the gradient of y, z what else is added to that of x
    w' = sum over the rows of y' x r

All of it is computed in float32.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.quantize.quantized import Quantized
from pallas_kernels.quantize.reference import quantize


def reciprocal_rms(x: Float[Array, "M d"], epsilon: float) -> Float[Array, " M"]:
    """Returns r in float32."""
    return lax.rsqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1) + epsilon)


def quantize_scaled(
    x: Float[Array, "M d"],
    reciprocal: Float[Array, " M"],
    weight: Float[Array, " d"],
    power_of_two_scales: bool,
    with_rows: bool,
) -> tuple[Quantized, Float[Array, "M d"] | None]:
    """Returns y quantized in 1x128 tiles, and y itself if it is wanted."""
    y = (x.astype(jnp.float32) * reciprocal[:, None] * weight).astype(x.dtype)
    return quantize(y, "1x128", power_of_two_scales), y if with_rows else None


def rms_norm_gradient(
    x: Float[Array, "M d"],
    reciprocal: Float[Array, " M"],
    weight: Float[Array, " d"],
    gradient: Float[Array, "M d"],
    plus: Float[Array, "M d"] | None,
) -> tuple[Float[Array, "M d"], Float[Array, " d"]]:
    """Returns x' in the dtype of x, and w'."""
    scaled = x.astype(jnp.float32) * reciprocal[:, None]
    gradient = gradient.astype(jnp.float32)
    weighted = gradient * weight
    mean = jnp.mean(weighted * scaled, axis=-1)
    x_bar = reciprocal[:, None] * (weighted - scaled * mean[:, None])
    if plus is not None:
        x_bar = x_bar + plus.astype(jnp.float32)
    return x_bar.astype(x.dtype), jnp.sum(gradient * scaled, axis=0)
