"""Root-mean-square normalisation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dsv3_jax.modules.parameter import ParameterShape


class RMSNorm(nnx.Module):
    """Computes y = w * x / sqrt(mean(x^2) + epsilon), statistics and gain in float32, the result in the dtype of x."""

    def __init__(self, width: int, epsilon: float, *, dtype: jnp.dtype):
        self.weight = ParameterShape((width,), axes=()).ones(dtype)
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        gain = self.weight[...].astype(wide.dtype)
        return (wide * scale * gain).astype(x.dtype)
