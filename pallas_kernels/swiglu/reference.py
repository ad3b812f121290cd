"""Defines SwiGLU with the quantization around it in plain jax.numpy.

    activation = silu(gate) * up            silu(z) = z / (1 + exp(-z))
    gate'      = gradient * up * s (1 + gate (1 - s))      s = 1 / (1 + exp(-gate))
    up'        = gradient * silu(gate)

All of it is computed in float32 and rounded once.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.quantize.quantized import Quantized
from pallas_kernels.quantize.reference import dequantize, quantize


def quantize_swiglu(gate_up: Float[Array, "M 2*W"], power_of_two_scales: bool) -> tuple[Quantized, Quantized]:
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=1)
    hidden = activation(gate, up).astype(gate_up.dtype)
    return quantize(hidden, "1x128", power_of_two_scales), quantize(gate_up, "1x128", False)


def swiglu_gradient(
    gate_up: Quantized, gradient: Float[Array, "M W"], power_of_two_scales: bool
) -> tuple[Float[Array, "M 2*W"], Quantized]:
    gate, up = jnp.split(dequantize(gate_up, jnp.dtype(jnp.float32)), 2, axis=1)
    hidden = activation(gate, up).astype(gradient.dtype)
    both = jnp.concatenate(gradients(gate, up, gradient.astype(jnp.float32)), axis=1)
    return both.astype(gradient.dtype), quantize(hidden, "128x1", power_of_two_scales).mT


def activation(gate: Float[Array, "..."], up: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns silu(gate) * up of float32 numbers."""
    return gate * (1 / (1 + jnp.exp(-gate))) * up


def gradients(
    gate: Float[Array, "..."], up: Float[Array, "..."], gradient: Float[Array, "..."]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Returns the gradients of gates and factors from that of the activation, all float32."""
    sigmoid = 1 / (1 + jnp.exp(-gate))
    return gradient * up * (sigmoid * (1 + gate * (1 - sigmoid))), gradient * (gate * sigmoid)
