"""Calls an implementation with checked operands, whose rows are first aligned as it needs them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.device import IMPLEMENTATIONS, Implementation, choose_implementation, kernel_module
from pallas_kernels.grouped_matmul import reference
from pallas_kernels.grouped_matmul.alignment import ROW_ALIGNMENT, align, take_rows
from pallas_kernels.quantize.quantized import Quantized
from pallas_kernels.quantize.reference import dequantize

_SMALLEST_BLOCK = 8  # rows; for a smaller alignment a CPU copies rows, which is faster than an iteration per row
_FLOAT32 = jnp.dtype(jnp.float32)


def choose(requested: Implementation | None, lhs: Array | Quantized) -> Implementation:
    """Returns the implementation for these operands; float32 has no kernel (tensor cores would round it)."""
    has_kernel = isinstance(lhs, Quantized) or lhs.dtype == jnp.bfloat16
    return choose_implementation(requested, IMPLEMENTATIONS if has_kernel else ("reference",))


def rows_by_weights(
    lhs: Float[Array, "M K"],
    rhs: Float[Array, "G N K"],
    group_sizes: Int[Array, " G"],
    row_alignment: int,
    out_dtype: jnp.dtype,
    implementation: Implementation,
    transposed: bool = False,
) -> Float[Array, "M N"]:
    """Returns `grouped_matmul` of plain operands; `transposed`: `rhs` is [G, K, N], contracted over K."""
    granule = _granule(lhs.shape[0], group_sizes.shape[0], row_alignment, implementation)
    if row_alignment % granule:
        layout = align(lhs.shape[0], group_sizes, granule)
        aligned = take_rows(lhs, layout.source)
        out = rows_by_weights(aligned, rhs, layout.group_sizes, granule, out_dtype, implementation, transposed)
        return take_rows(out, layout.destination)
    if implementation == "reference":
        return reference.rows_by_weights(lhs, rhs, group_sizes, row_alignment, transposed).astype(out_dtype)
    return kernel_module("grouped_matmul", implementation).rows_by_weights(
        lhs, rhs, group_sizes, out_dtype, transposed=transposed
    )


def rows_by_quantized_weights(
    lhs: Quantized,
    rhs: Quantized,
    group_sizes: Int[Array, " G"],
    row_alignment: int,
    out_dtype: jnp.dtype,
    implementation: Implementation,
) -> Float[Array, "M N"]:
    if implementation == "reference":
        plain = dequantize(lhs, _FLOAT32), dequantize(rhs, _FLOAT32)
        return rows_by_weights(*plain, group_sizes, row_alignment, out_dtype, implementation)
    if row_alignment % ROW_ALIGNMENT:
        layout = align(lhs.shape[0], group_sizes, ROW_ALIGNMENT)
        aligned = Quantized(take_rows(lhs.values, layout.source), take_rows(lhs.scales, layout.source), lhs.tile)
        out = rows_by_quantized_weights(aligned, rhs, layout.group_sizes, ROW_ALIGNMENT, out_dtype, implementation)
        return take_rows(out, layout.destination)
    return kernel_module("grouped_matmul", implementation).rows_by_weights(lhs, rhs, group_sizes, out_dtype)


def rows_by_rows(
    lhs: Float[Array, "*P M N"],
    rhs: Float[Array, "*P M K"],
    group_sizes: Int[Array, "*P G"],
    accumulator: Float[Array, "G N K"] | None,
    row_alignment: int,
    implementation: Implementation,
) -> Float[Array, "G N K"]:
    """Returns `grouped_weight_gradient` of plain operands."""
    granule = _granule(lhs.shape[-2], group_sizes.shape[-1], row_alignment, implementation)
    if group_sizes.ndim == 2 and (implementation == "reference" or row_alignment % granule):
        return _part_by_part(rows_by_rows, (lhs, rhs, group_sizes), accumulator, row_alignment, implementation)
    if row_alignment % granule:
        layout = align(lhs.shape[0], group_sizes, granule)
        aligned = take_rows(lhs, layout.source), take_rows(rhs, layout.source)
        return rows_by_rows(*aligned, layout.group_sizes, accumulator, granule, implementation)
    if implementation == "reference":
        product = reference.rows_by_rows(lhs, rhs, group_sizes, row_alignment)
        return product if accumulator is None else accumulator + product
    return kernel_module("grouped_matmul", implementation).rows_by_rows(lhs, rhs, group_sizes, accumulator)


def quantized_rows_by_rows(
    lhs: Quantized,
    rhs: Quantized,
    group_sizes: Int[Array, "*P G"],
    accumulator: Float[Array, "G N K"] | None,
    row_alignment: int,
    implementation: Implementation,
) -> Float[Array, "G N K"]:
    """Returns `grouped_weight_gradient` of operands in FP8."""
    if implementation == "reference":
        if group_sizes.ndim == 2:
            operands = lhs, rhs, group_sizes
            return _part_by_part(quantized_rows_by_rows, operands, accumulator, row_alignment, implementation)
        plain = dequantize(lhs, _FLOAT32).T, dequantize(rhs, _FLOAT32).T
        return rows_by_rows(*plain, group_sizes, accumulator, row_alignment, implementation)
    return kernel_module("grouped_matmul", implementation).rows_by_rows(lhs, rhs, group_sizes, accumulator)


def _part_by_part(product, operands, accumulator, row_alignment: int, implementation) -> Float[Array, "G N K"]:
    """Returns the sum of the parts' products."""

    def add(total, part):
        return product(*part, total, row_alignment, implementation), None

    first, others = jax.tree.map(lambda x: x[0], operands), jax.tree.map(lambda x: x[1:], operands)
    return lax.scan(add, product(*first, accumulator, row_alignment, implementation), others)[0]


def masked(
    lhs: Float[Array, "G M K"] | Quantized,
    rhs: Float[Array, "G N K"] | Quantized,
    counts: Int[Array, " G"],
    out_dtype: jnp.dtype,
    implementation: Implementation,
) -> Float[Array, "G M N"]:
    if implementation == "reference":
        if isinstance(lhs, Quantized) and isinstance(rhs, Quantized):
            lhs, rhs = dequantize(lhs, _FLOAT32), dequantize(rhs, _FLOAT32)
        return reference.masked(lhs, rhs, counts).astype(out_dtype)  # pyright: ignore[reportArgumentType]
    return kernel_module("grouped_matmul", implementation).masked(lhs, rhs, counts, out_dtype)


def _granule(rows: int, groups: int, row_alignment: int, implementation: Implementation) -> int:
    """Returns the row alignment that the implementation needs or is much faster with."""
    if implementation != "reference":
        return ROW_ALIGNMENT
    if row_alignment >= _SMALLEST_BLOCK or rows < 2 * _SMALLEST_BLOCK * groups:
        return row_alignment
    return _SMALLEST_BLOCK
