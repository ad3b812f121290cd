"""A linear map without bias, its weight laid out as the report writes it: y = W x, W [out, in]."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

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
        self.on_ranks: Any = None  # what multiplies where tokens and weight lie on several devices
        self.weight = nnx.Param(normal(rngs, (*self.out_shape, *self.in_shape), scale, dtype))

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """x [*batch, *in] -> [*batch, *out], in the recipe's dtype."""
        product = functools.partial(
            _product, in_axes=len(self.in_shape), precision=self.precision, after_attention=self.after_attention
        )
        return self.multiply(product, x, batch_axes=x.ndim - len(self.in_shape))

    def multiply(
        self, product: Callable[[Array, Array], Array], x: Float[Array, "..."], *, batch_axes: int
    ) -> Float[Array, "..."]:
        """product(x, weight), on one device or wherever tokens and weight lie; x has so many axes before its inputs."""
        if self.on_ranks is None:
            return product(x, self.weight[...])
        # FP8 tiles are cut from the weight as it is stored: rounded on its way they would be others.
        dtype = self.weight[...].dtype if self.precision.fp8 is not None else self.precision.dtype
        in_axes = len(self.in_shape)
        return self.on_ranks(product, x, self.weight[...], batch_axes=batch_axes, in_axes=in_axes, dtype=dtype)


def _product(
    x: Float[Array, "..."],
    weight: Float[Array, "..."],
    *,
    in_axes: int,
    precision: Precision,
    after_attention: bool,
) -> Float[Array, "..."]:
    """W x for a weight [*out, *in] with so many input axes, which may be a part of the map's."""
    batch, inputs = x.shape[: x.ndim - in_axes], math.prod(x.shape[x.ndim - in_axes :])
    y = linear(x.reshape(*batch, inputs), weight.reshape(-1, inputs), precision, after_attention=after_attention)
    return y.reshape(*batch, *weight.shape[: weight.ndim - in_axes])


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], scale: float, dtype: jnp.dtype) -> jax.Array:
    """Initial weights N(0, scale^2) (report section 4.2)."""
    return (scale * jax.random.normal(rngs.params(), shape, jnp.float32)).astype(dtype)
