"""A differentiable FP8 product: a Linear layer's three products as the report runs them (section 3.3, figure 6).

    forward          Y  = X Wᵀ    X 1x128 along K,  W 128x128        contraction over K
    input gradient   dX = dY W    dY 1x128 along N, W 128x128        contraction over N
    weight gradient  dW = dYᵀ X   dY and X 1x128 along the tokens    contraction over M

What is kept for the backward pass is FP8: X in the tiles of the forward product, re-tiled along the tokens when the
weight gradient needs it (section 3.5.2), and W, whose square blocks serve both directions.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.blockwise_matmul import blockwise_matmul
from pallas_kernels.device import Implementation
from pallas_kernels.quantize import quantize, quantize_both, requantize_transposed

__all__ = ["fp8_matmul"]


def fp8_matmul(
    x: Float[Array, "M K"],
    w: Float[Array, "N K"],
    *,
    out_dtype: DTypeLike | None = None,
    power_of_two_scales: bool = False,
    implementation: Implementation | None = None,
) -> Float[Array, "M N"]:
    """x · wᵀ with both operands rounded to e4m3, differentiable in both; the gradients' operands are e4m3 as well.

    Args:
      x: float32 or bfloat16. Its gradient has its dtype.
      w: float32 or bfloat16, [out, in]. Its gradient is summed in float32 and has its dtype.
      out_dtype: bfloat16 or float32; the dtype of `x` unless given.
      power_of_two_scales: for the scales of `x` alone, the tensor that is re-tiled.

    Raises:
      ValueError, TypeError: shapes or dtypes that do not fit, an implementation that cannot run here.
    """
    for name, operand in (("x", x), ("w", w)):
        if operand.ndim != 2:
            raise ValueError(f"{name} must have 2 dimensions, not shape {operand.shape}")
    if x.shape[1] != w.shape[1]:
        raise ValueError(f"w must be [N, {x.shape[1]}] as x is {x.shape}, not {w.shape}")
    return _fp8_matmul(x, w, jnp.dtype(out_dtype or x.dtype), power_of_two_scales, implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _fp8_matmul(x, w, out_dtype, power_of_two_scales, implementation):
    out, _ = _forward(x, w, out_dtype, power_of_two_scales, implementation)
    return out


def _forward(x, w, out_dtype, power_of_two_scales, implementation):
    qx = quantize(x, tile="1x128", power_of_two_scales=power_of_two_scales, implementation=implementation)
    qw = quantize(w, tile="128x128", implementation=implementation)
    out = blockwise_matmul(qx, qw, out_dtype=out_dtype, implementation=implementation)
    # Empty arrays carry the dtypes of the gradients: residuals must be arrays.
    return out, (qx, qw, jnp.empty(0, x.dtype), jnp.empty(0, w.dtype))


def _backward(out_dtype, power_of_two_scales, implementation, residuals, out_bar):
    qx, qw, x_like, w_like = residuals
    rows, columns = quantize_both(out_bar, implementation=implementation)
    x_bar = blockwise_matmul(rows, qw.mT, out_dtype=x_like.dtype, implementation=implementation)
    x_columns = requantize_transposed(qx, power_of_two_scales=power_of_two_scales, implementation=implementation)
    w_bar = blockwise_matmul(columns, x_columns, out_dtype=jnp.dtype(jnp.float32), implementation=implementation)
    return x_bar, w_bar.astype(w_like.dtype)


_fp8_matmul.defvjp(_forward, _backward)
