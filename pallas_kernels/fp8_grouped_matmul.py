"""A differentiable FP8 product over expert groups: `fp8_matmul` with one matrix a group (report section 3.3).

    forward          Y  = X W_gᵀ          X 1x128 along K,  W 128x128        contraction over K
    input gradient   dX = dY W_g          dY 1x128 along N, W 128x128        contraction over N
    weight gradient  dW_g = dY_gᵀ X_g     dY and X 1x128 along the rows      contraction over the group's rows

Groups are multiples of 128 rows, so that no tile along the rows belongs to two experts. What is kept for the backward
pass is FP8.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.device import Implementation
from pallas_kernels.grouped_matmul import grouped_matmul, grouped_weight_gradient
from pallas_kernels.grouped_matmul.checks import FP8_ROWS, check_rows
from pallas_kernels.quantize import quantize, quantize_both, requantize_transposed

__all__ = ["fp8_grouped_matmul"]


def fp8_grouped_matmul(
    lhs: Float[Array, "M K"],
    rhs: Float[Array, "G N K"],
    group_sizes: Int[Array, " G"],
    *,
    row_alignment: int = FP8_ROWS,
    out_dtype: DTypeLike | None = None,
    power_of_two_scales: bool = False,
    implementation: Implementation | None = None,
) -> Float[Array, "M N"]:
    """lhs[r] · rhs[g]ᵀ for each row r of group g with both operands rounded to e4m3, differentiable in both.

    Args:
      lhs: float32 or bfloat16, rows contiguous by group. Its gradient has its dtype.
      rhs: float32 or bfloat16, [out, in] a group. Its gradient is summed in float32 and has its dtype.
      group_sizes: rows of each group, multiples of 128; the rows after them give zeros.
      row_alignment: the caller's promise that M and every group size are multiples of it; a multiple of 128.
      out_dtype: bfloat16 or float32; the dtype of `lhs` unless given.
      power_of_two_scales: for the scales of `lhs` alone, the tensor that is re-tiled.

    Raises:
      ValueError, TypeError: shapes or dtypes that do not fit, an implementation that cannot run here.
    """
    if row_alignment % FP8_ROWS:
        raise ValueError(f"row_alignment must be a multiple of {FP8_ROWS} for FP8 tiles, not {row_alignment}")
    for name, operand in (("lhs", lhs), ("rhs", rhs)):
        if operand.dtype not in (jnp.float32, jnp.bfloat16):
            raise TypeError(f"{name} must be float32 or bfloat16, not {operand.dtype}")
    check_rows(lhs, jax.ShapeDtypeStruct(rhs.shape, lhs.dtype), group_sizes, row_alignment)
    out_dtype = jnp.dtype(out_dtype or lhs.dtype)
    return _fp8_grouped_matmul(lhs, rhs, group_sizes, row_alignment, out_dtype, power_of_two_scales, implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def _fp8_grouped_matmul(lhs, rhs, group_sizes, row_alignment, out_dtype, power_of_two_scales, implementation):
    out, _ = _forward(lhs, rhs, group_sizes, row_alignment, out_dtype, power_of_two_scales, implementation)
    return out


def _forward(lhs, rhs, group_sizes, row_alignment, out_dtype, power_of_two_scales, implementation):
    rows = quantize(lhs, tile="1x128", power_of_two_scales=power_of_two_scales, implementation=implementation)
    weights = quantize(rhs, tile="128x128", implementation=implementation)
    where = {"row_alignment": row_alignment, "implementation": implementation}
    out = grouped_matmul(rows, weights, group_sizes, out_dtype=out_dtype, **where)
    # Empty arrays carry the dtypes of the gradients: residuals must be arrays.
    return out, (rows, weights, group_sizes, jnp.empty(0, lhs.dtype), jnp.empty(0, rhs.dtype))


def _backward(row_alignment, out_dtype, power_of_two_scales, implementation, residuals, out_bar):
    lhs, weights, group_sizes, lhs_like, rhs_like = residuals
    where = {"row_alignment": row_alignment, "implementation": implementation}
    rows, columns = quantize_both(out_bar, implementation=implementation)
    lhs_bar = grouped_matmul(rows, weights.mT, group_sizes, out_dtype=lhs_like.dtype, **where)
    lhs_columns = requantize_transposed(lhs, power_of_two_scales=power_of_two_scales, implementation=implementation)
    rhs_bar = grouped_weight_gradient(columns, lhs_columns, group_sizes, **where)
    return lhs_bar, rhs_bar.astype(rhs_like.dtype), None


_fp8_grouped_matmul.defvjp(_forward, _backward)
