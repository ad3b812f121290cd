"""A linear map without bias, its weight stored as the report writes it: y = W x, W [out, in]."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dsv3_jax.modules.devices import Devices
from dsv3_jax.modules.parameter import LogicalAxis, ParameterShape
from dsv3_jax.precision import Precision, PreparedRows, linear


class Linear(nnx.Module):
    """Computes y = W x under a precision recipe.

    Outputs and inputs may have several axes, such as [heads, head width]; the product is over all input axes, and the
    weight keeps both lists in order: [*out, *in].

    Args:
      out_shape, in_shape: sizes of the output and input axes.
      axes: a logical axis per dimension of the weight.
      scale: standard deviation of the initial weights.
      dtype: dtype of the weight.
      precision: recipe of the product.
      devices: what multiplies where tokens and weight are sharded.
      after_attention: the input is the attention's output (see `dsv3_jax.precision.linear`).
    """

    def __init__(
        self,
        out_shape: int | tuple[int, ...],
        in_shape: int | tuple[int, ...],
        axes: tuple[LogicalAxis | None, ...],
        *,
        scale: float,
        dtype: jnp.dtype,
        precision: Precision,
        devices: Devices,
        rngs: nnx.Rngs,
        after_attention: bool = False,
    ):
        self.after_attention = after_attention
        out_shape = (out_shape,) if isinstance(out_shape, int) else out_shape
        in_shape = (in_shape,) if isinstance(in_shape, int) else in_shape
        self.in_axes = len(in_shape)
        self.precision = precision
        self.devices = devices
        self.shape = ParameterShape((*out_shape, *in_shape), axes)
        self.weight = self.shape.normal(rngs, scale, dtype)

    def __call__(self, x: Float[Array, "..."] | PreparedRows) -> Float[Array, "..."]:
        """Maps x [*batch, *in] to [*batch, *out], in the recipe's dtype."""
        product = functools.partial(
            _product, in_axes=self.in_axes, precision=self.precision, after_attention=self.after_attention
        )
        return self.multiply(product, x, batch_axes=x.ndim - self.in_axes)

    def multiply(
        self,
        product: Callable[[Any, Array], Array],
        x: Float[Array, "..."] | PreparedRows,
        *,
        batch_axes: int,
    ) -> Float[Array, "..."]:
        """Returns product(x, weight) for a product that is linear in the weight; `x` has `batch_axes` batch axes."""
        return self.devices.multiply(
            product,
            x,
            self.weight[...],
            self.shape,
            batch_axes=batch_axes,
            in_axes=self.in_axes,
            gather_dtype=self.precision.gather_dtype or self.weight[...].dtype,
        )


def _product(
    x: Float[Array, "..."] | PreparedRows,
    weight: Float[Array, "..."],
    *,
    in_axes: int,
    precision: Precision,
    after_attention: bool,
) -> Float[Array, "..."]:
    """Returns W x for a weight [*out, *in] with that many input axes, which may be a shard of the map's."""
    batch, inputs = x.shape[: x.ndim - in_axes], math.prod(x.shape[x.ndim - in_axes :])
    y = linear(x.reshape(*batch, inputs), weight.reshape(-1, inputs), precision, after_attention=after_attention)
    return y.reshape(*batch, *weight.shape[: weight.ndim - in_axes])
