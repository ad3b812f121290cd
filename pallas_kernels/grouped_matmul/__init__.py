"""Matrix products over groups of rows with one weight matrix per group: the experts of a mixture.

Plain operands (float32, bfloat16) or FP8 ones (`Quantized`, report section 3.3.2), in three forms:

    grouped_matmul            rows contiguous by group      out[r]  = lhs[r] · rhs[group of r]ᵀ
    grouped_weight_gradient   groups along the contraction  out[g]  = lhs[rows of g]ᵀ · rhs[rows of g]
    masked_grouped_matmul     M rows for each group         out[g, r] = lhs[g, r] · rhs[g]ᵀ for r < counts[g]

Only the first is differentiable, and only in plain operands.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.device import Implementation, choose_implementation
from pallas_kernels.grouped_matmul import dispatch
from pallas_kernels.grouped_matmul.alignment import ROW_ALIGNMENT
from pallas_kernels.grouped_matmul.checks import check_contraction, check_masked, check_rows
from pallas_kernels.quantize.quantized import Quantized

__all__ = ["grouped_matmul", "grouped_weight_gradient", "masked_grouped_matmul", "preferred_row_alignment"]

_BLOCKS = (64, 32, 16, 8, 4, 2, 1)


def preferred_row_alignment(rows: int, groups: int, implementation: Implementation | None = None) -> int:
    """Returns the multiple to pad each group to so that the product of `rows` rows over `groups` groups is fastest.

    On an accelerator it is the rows of a tile. On a CPU padding costs half a block per group on average, and small
    blocks cost iterations: it is the largest block of up to 64 rows that an even group would fill. FP8 products need
    128 everywhere.
    """
    if choose_implementation(implementation) != "reference":
        return ROW_ALIGNMENT
    even = max(rows // groups, 1)
    return next(block for block in _BLOCKS if block <= even)


@jax.named_scope("grouped_matmul")
def grouped_matmul(
    lhs: Float[Array, "M K"] | Quantized,
    rhs: Float[Array, "G N K"] | Quantized,
    group_sizes: Int[Array, " G"],
    *,
    row_alignment: int = 1,
    out_dtype: DTypeLike | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "M N"]:
    """Returns lhs[r] · rhs[g]ᵀ for each row r of group g, summed in float32; differentiable in plain operands.

    Args:
      lhs: rows contiguous by group, in the order of the groups; float32 or bfloat16, or FP8 in 1x128 tiles.
      rhs: one matrix [out, in] per group; in the dtype of `lhs`, or FP8 in 128x128 blocks.
      group_sizes: rows of each group. They may add up to fewer than M: the rows after them give zeros.
      row_alignment: the caller's promise that M and every group size are multiples of it. Where a kernel needs a
        larger one (128), rows are copied into an aligned layout and back, so promise the largest that is true.
      out_dtype: dtype of the result; that of `lhs` (bfloat16 for FP8) unless given.

    Raises:
      ValueError, TypeError: a shape or dtype that does not fit, which is named, or an implementation that cannot run.
    """
    quantized = check_rows(lhs, rhs, group_sizes, row_alignment)
    implementation = dispatch.choose(implementation, lhs)
    out_dtype = jnp.dtype(out_dtype or (jnp.bfloat16 if quantized else lhs.dtype))  # pyright: ignore
    if quantized:
        return dispatch.rows_by_quantized_weights(lhs, rhs, group_sizes, row_alignment, out_dtype, implementation)  # pyright: ignore
    return _grouped_matmul(lhs, rhs, group_sizes, row_alignment, out_dtype, implementation)


@jax.named_scope("grouped_weight_gradient")
def grouped_weight_gradient(
    lhs: Float[Array, "*P M N"] | Quantized,
    rhs: Float[Array, "*P M K"] | Quantized,
    group_sizes: Int[Array, "*P G"],
    *,
    accumulator: Float[Array, "G N K"] | None = None,
    row_alignment: int = 1,
    implementation: Implementation | None = None,
) -> Float[Array, "G N K"]:
    """Returns lhs[rows of g]ᵀ · rhs[rows of g] (+ accumulator) for every group g in float32. It has no gradient.

    The product of an empty group is zero.

    Args:
      lhs, rhs: float32 or bfloat16, rows contiguous by group as in `grouped_matmul`; or FP8 and transposed, [N, M]
        and [K, M], in 1x128 tiles along the rows (as `quantize_both` gives them). FP8 groups are multiples of 128.
      group_sizes: rows of each group. With a leading axis P, which `lhs` and `rhs` have too, the rows come in parts,
        such as micro-batches. Each part is sorted by group, and a group's product is over its rows in all parts.
      accumulator: float32, added to the gradients, as of the micro-batches before.
      row_alignment: the caller's promise that M and every group size are multiples of it.

    Raises:
      ValueError, TypeError: a shape or dtype that does not fit, which is named, or an implementation that cannot run.
    """
    quantized = check_contraction(lhs, rhs, group_sizes, accumulator, row_alignment)
    implementation = dispatch.choose(implementation, lhs)
    if quantized:
        return dispatch.quantized_rows_by_rows(lhs, rhs, group_sizes, accumulator, row_alignment, implementation)  # pyright: ignore
    return dispatch.rows_by_rows(lhs, rhs, group_sizes, accumulator, row_alignment, implementation)  # pyright: ignore


@jax.named_scope("masked_grouped_matmul")
def masked_grouped_matmul(
    lhs: Float[Array, "G M K"] | Quantized,
    rhs: Float[Array, "G N K"] | Quantized,
    counts: Int[Array, " G"],
    *,
    out_dtype: DTypeLike | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "G M N"]:
    """Returns lhs[g, r] · rhs[g]ᵀ for r < counts[g] and zeros for the other rows: the layout for decoding.

    Every group has M rows whatever their number, so that one compiled program serves every step; kernels skip tiles
    without rows. Operands are as in `grouped_matmul`. Not differentiable.

    Raises:
      ValueError, TypeError: a shape or dtype that does not fit, which is named, or an implementation that cannot run.
    """
    quantized = check_masked(lhs, rhs, counts)
    implementation = dispatch.choose(implementation, lhs)
    out_dtype = jnp.dtype(out_dtype or (jnp.bfloat16 if quantized else lhs.dtype))  # pyright: ignore
    return dispatch.masked(lhs, rhs, counts, out_dtype, implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _grouped_matmul(lhs, rhs, group_sizes, row_alignment, out_dtype, implementation):
    return dispatch.rows_by_weights(lhs, rhs, group_sizes, row_alignment, out_dtype, implementation)


def _forward(lhs, rhs, group_sizes, row_alignment, out_dtype, implementation):
    out = _grouped_matmul(lhs, rhs, group_sizes, row_alignment, out_dtype, implementation)
    return out, (lhs, rhs, group_sizes)


def _backward(row_alignment, out_dtype, implementation, residuals, out_bar):
    lhs, rhs, group_sizes = residuals
    out_bar = out_bar.astype(lhs.dtype)
    lhs_bar = dispatch.rows_by_weights(
        out_bar, rhs, group_sizes, row_alignment, lhs.dtype, implementation, transposed=True
    )
    rhs_bar = dispatch.rows_by_rows(out_bar, lhs, group_sizes, None, row_alignment, implementation)
    return lhs_bar, rhs_bar.astype(rhs.dtype), None


_grouped_matmul.defvjp(_forward, _backward)
