"""A linear map without bias, its weight laid out as the report writes it: y = W x, W [out, in]."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dsv3_jax.precision import Precision, linear


class Linear(nnx.Module):
    """y = W x under a precision recipe.

    The output (input) axes may be several, such as [heads, head width]; the product is over all input axes, and
    the weight keeps both lists in order: [*out, *in]. `after_attention`: see `dsv3_jax.precision.linear`.
    """

    def __init__(
        self,
        out_shape: int | tuple[int, ...],
        in_shape: int | tuple[int, ...],
        *,
        scale: float,
        dtype: jnp.dtype,
        precision: Precision,
        rngs: nnx.Rngs,
        after_attention: bool = False,
    ):
        self.after_attention = after_attention
        self.out_shape = (out_shape,) if isinstance(out_shape, int) else out_shape
        self.in_shape = (in_shape,) if isinstance(in_shape, int) else in_shape
        self.precision = precision
        self.weight = nnx.Param(normal(rngs, (*self.out_shape, *self.in_shape), scale, dtype))

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """x [*batch, *in] -> [*batch, *out], in the recipe's dtype."""
        batch = x.shape[: x.ndim - len(self.in_shape)]
        flat_in = math.prod(self.in_shape)
        matrix = self.weight[...].reshape(-1, flat_in)
        y = linear(x.reshape(*batch, flat_in), matrix, self.precision, after_attention=self.after_attention)
        return y.reshape(*batch, *self.out_shape)


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], scale: float, dtype: jnp.dtype) -> jax.Array:
    """Initial weights N(0, scale^2) (report section 4.2)."""
    return (scale * jax.random.normal(rngs.params(), shape, jnp.float32)).astype(dtype)
