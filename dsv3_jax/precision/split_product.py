"""A product of a bfloat16 and a float32 matrix on tensor cores with float32's accuracy.

Tensor cores multiply bfloat16 exactly and sum in float32. A float32 number is the sum of three in bfloat16, of 8
significant bits each. So x · Wᵀ is three bfloat16 products, done as one: W's parts are stacked. A float32 product in
full precision runs on the ordinary lanes of a GPU, at a fifteenth of the rate.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float, Float32


@jax.custom_vjp
def split_product(x: BFloat16[Array, "*T d"], weight: Float32[Array, "E d"]) -> Float32[Array, "*T E"]:
    """Returns x Wᵀ in float32. The gradients have the accuracy of the dtypes that they are returned in."""
    return _sum_of_parts(_contract(x, jnp.concatenate(parts(weight)), x.ndim - 1, 1), axis=-1)


def _forward(x, weight):
    return split_product(x, weight), (x, weight)


def _backward(residuals, out_bar):
    x, weight = residuals
    high, middle, low = parts(out_bar)
    weight_high, weight_middle, _ = parts(weight)
    # Rounded to bfloat16 in the end, this one needs no more than the three largest of the nine products of parts.
    left = jnp.concatenate([high, middle, high], axis=-1)
    right = jnp.concatenate([weight_high, weight_high, weight_middle])
    x_bar = _contract(left, right, left.ndim - 1, 0).astype(x.dtype)
    tokens = tuple(range(x.ndim - 1))
    stacked = jnp.concatenate([high, middle, low], axis=-1)
    weight_bar = lax.dot_general(stacked, x, ((tokens, tokens), ((), ())), preferred_element_type=jnp.float32)
    return x_bar, _sum_of_parts(weight_bar, axis=0)


split_product.defvjp(_forward, _backward)


def parts(x: Float32[Array, "..."]) -> list[BFloat16[Array, "..."]]:
    """Returns three arrays whose sum is `x`, the largest first."""
    result = []
    for _ in range(3):
        # Not a conversion there and back, which XLA may leave out as if it changed nothing.
        part = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        result.append(part.astype(jnp.bfloat16))
        x = x - part
    return result


def _contract(x: Array, y: Array, x_axis: int, y_axis: int) -> Float[Array, "..."]:
    return lax.dot_general(x, y, (((x_axis,), (y_axis,)), ((), ())), preferred_element_type=jnp.float32)


def _sum_of_parts(x: Float32[Array, "..."], axis: int) -> Float32[Array, "..."]:
    """Returns the sum of the three thirds of an axis, the smallest first."""
    high, middle, low = jnp.split(x, 3, axis=axis)
    return low + middle + high
