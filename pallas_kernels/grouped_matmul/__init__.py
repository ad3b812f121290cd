"""Matrix products over groups of rows, one weight matrix a group: the experts of a mixture."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.device import Implementation, choose_implementation
from pallas_kernels.grouped_matmul import reference

__all__ = ["grouped_matmul", "preferred_row_alignment"]

_BLOCKS = (64, 32, 16, 8, 4, 2, 1)


def preferred_row_alignment(rows: int, groups: int, implementation: Implementation | None = None) -> int:
    """What to pad each group to so that the product of `rows` rows over `groups` groups is fastest.

    Padding costs half a block a group on average, small blocks cost trips: the block is the largest of up to 64 rows
    that an even group would fill.
    """
    choose_implementation(implementation)
    even = max(rows // groups, 1)
    return next(block for block in _BLOCKS if block <= even)


def grouped_matmul(
    lhs: Float[Array, "M K"],
    rhs: Float[Array, "G N K"],
    group_sizes: Int[Array, " G"],
    *,
    row_alignment: int = 1,
    out_dtype: jnp.dtype | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "M N"]:
    """lhs[r] · rhs[g]ᵀ for each row r of group g, summed in float32; differentiable in `lhs` and `rhs`.

    Args:
      lhs: rows contiguous by group, in the order of the groups; float32 or bfloat16.
      rhs: one matrix a group, [out, in]; dtype of `lhs`.
      group_sizes: rows of each group. They may add up to fewer than M: the rows after them give zeros.
      row_alignment: the caller's promise that M and every group size are multiples of it.
      out_dtype: of the result; that of `lhs` unless given.

    Raises:
      ValueError, TypeError: shapes or dtypes that do not fit, named.
    """
    _check(lhs, rhs, group_sizes, row_alignment)
    choose_implementation(implementation)
    return _grouped_matmul(lhs, rhs, group_sizes, row_alignment, jnp.dtype(out_dtype or lhs.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _grouped_matmul(lhs, rhs, group_sizes, row_alignment, out_dtype):
    return reference.rows_by_weights(lhs, rhs, group_sizes, row_alignment).astype(out_dtype)


def _forward(lhs, rhs, group_sizes, row_alignment, out_dtype):
    return _grouped_matmul(lhs, rhs, group_sizes, row_alignment, out_dtype), (lhs, rhs, group_sizes)


def _backward(row_alignment, out_dtype, residuals, out_bar):
    lhs, rhs, group_sizes = residuals
    out_bar = out_bar.astype(lhs.dtype)
    lhs_bar = reference.rows_by_weights(out_bar, jnp.swapaxes(rhs, 1, 2), group_sizes, row_alignment)
    rhs_bar = reference.rows_by_rows(out_bar, lhs, group_sizes, row_alignment)
    return lhs_bar.astype(lhs.dtype), rhs_bar.astype(rhs.dtype), None


_grouped_matmul.defvjp(_forward, _backward)


def _check(lhs, rhs, group_sizes, row_alignment) -> None:
    if lhs.ndim != 2:
        raise ValueError(f"lhs must be [rows, in], not of shape {lhs.shape}")
    if rhs.ndim != 3 or rhs.shape[2] != lhs.shape[1]:
        raise ValueError(f"rhs must be [groups, out, {lhs.shape[1]}] as lhs is {lhs.shape}, not {rhs.shape}")
    if group_sizes.shape != rhs.shape[:1]:
        raise ValueError(f"group_sizes must have shape ({rhs.shape[0]},) as rhs has groups, not {group_sizes.shape}")
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise TypeError(f"group_sizes must hold integers, not {group_sizes.dtype}")
    if lhs.dtype != rhs.dtype:
        raise TypeError(f"lhs and rhs must have one dtype, not {lhs.dtype} and {rhs.dtype}")
    if row_alignment < 1 or lhs.shape[0] % row_alignment:
        raise ValueError(f"row_alignment must divide the {lhs.shape[0]} rows of lhs, not {row_alignment}")
