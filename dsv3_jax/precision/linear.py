"""The linear maps of the model under a precision recipe: with one matrix or one per expert, plain or after SwiGLU.

A map after SwiGLU takes the input of SwiGLU, so that a recipe can keep that in a small format and recompute the rest.
Weights are arrays, or weights kept in another format (`Fp8Weight`, `Int8Weight`, `TiledWeight`), which get no gradient.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import pallas_kernels
from dsv3_jax.precision.attended import AttendedRows
from dsv3_jax.precision.fp8_layer import fp8_product, fp8_product_by_row, weight_tiles
from dsv3_jax.precision.fp8_recipe import Role
from dsv3_jax.precision.fp8_weight import Fp8Weight
from dsv3_jax.precision.int8_weight import Int8Weight
from dsv3_jax.precision.keeping import keep
from dsv3_jax.precision.prepared import PreparedRows, QuantizedRows
from dsv3_jax.precision.recipe import Precision
from dsv3_jax.precision.swiglu import swiglu
from dsv3_jax.precision.tiled_weight import TiledWeight
from dsv3_jax.precision.tiles import dequantize
from dsv3_jax.precision.weight_product import weight_product
from pallas_kernels import TILE
from pallas_kernels.grouped_matmul.alignment import align, take_rows


def linear(
    x: Float[Array, "*batch in"] | PreparedRows,
    weight: Float[Array, "out in"] | Fp8Weight | Int8Weight | TiledWeight,
    precision: Precision,
    *,
    after_attention: bool = False,
) -> Float[Array, "*batch out"]:
    """Returns y = W x in the recipe's dtype. Operands are in that dtype, FP8 or int8; sums are in float32 or int32.

    Args:
      x: an array; the output of an RMSNorm that is quantized already; or that of attention, kept already.
      after_attention: x is the attention's output, which recipes keep for the backward pass in a format of its own.
    """
    dtype = precision.dtype
    if precision.fp8 is not None and not isinstance(weight, Int8Weight | TiledWeight):
        rows, role = x.reshape(-1, x.shape[-1]), Role(after_attention=after_attention)
        rows = rows if isinstance(rows, PreparedRows) else rows.astype(dtype)
        y = fp8_product(rows, weight, None, precision.fp8, role)
        return y.reshape(*x.shape[:-1], y.shape[-1])
    if isinstance(x, AttendedRows):
        x, after_attention = x.rows, False
    assert not isinstance(x, PreparedRows)
    if isinstance(weight, Int8Weight | TiledWeight):
        return weight.product(x, dtype)
    if after_attention:
        x = keep(x)
    if isinstance(weight, Fp8Weight):
        weight = weight.astype(dtype)
    y = weight_product(x.reshape(-1, x.shape[-1]), weight, dtype, dtype)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def swiglu_linear(
    gate_up: Float[Array, "*batch 2 width"], weight: Float[Array, "out width"] | Fp8Weight, precision: Precision
) -> Float[Array, "*batch out"]:
    """Returns y = W (silu(gate) * up) in the recipe's dtype."""
    if precision.fp8 is None:
        return linear(swiglu(keep(gate_up)), weight, precision)
    flat = gate_up.reshape(-1, 2 * gate_up.shape[-1]).astype(precision.dtype)
    y = fp8_product(flat, weight, None, precision.fp8, Role(swiglu=True))
    return y.reshape(*gate_up.shape[:-2], y.shape[-1])


def grouped_linear(
    rows: Float[Array, "M in"] | QuantizedRows,
    weights: Float[Array, "E out in"] | Fp8Weight | Int8Weight | TiledWeight,
    group_sizes: Int[Array, " E"] | None,
    *,
    row_alignment: int,
    precision: Precision,
) -> Float[Array, "M out"]:
    """Returns y_r = W_e x_r for rows r sorted by expert e.

    Args:
      rows: an array; or rows that were sent to the experts in FP8, under a recipe that sends them so.
      group_sizes: the number of rows of each expert, multiples of `row_alignment`; None if all have equally many,
        which is possible without FP8, and always so with weights in int8 or in tiles.
    """
    dtype = precision.dtype
    if isinstance(rows, QuantizedRows):
        assert precision.fp8 is not None
        assert group_sizes is not None
        assert not isinstance(weights, Int8Weight | TiledWeight)
        return _fp8_by_group(rows, weights, group_sizes, row_alignment, precision, Role(dispatched=True))
    if isinstance(weights, Int8Weight | TiledWeight):
        assert group_sizes is None
        by_expert = rows.reshape(weights.shape[0], -1, rows.shape[-1])
        return weights.product(by_expert, dtype).reshape(rows.shape[0], -1)
    if group_sizes is None:
        assert not isinstance(weights, Fp8Weight)
        by_expert = rows.reshape(weights.shape[0], -1, rows.shape[-1])
        return weight_product(by_expert, weights, dtype, dtype).reshape(rows.shape[0], -1)
    if precision.fp8 is not None:
        role = Role(dispatched=True)
        return _fp8_by_group(rows.astype(dtype), weights, group_sizes, row_alignment, precision, role)
    return pallas_kernels.grouped_matmul(
        rows.astype(dtype),
        weights.astype(dtype),
        group_sizes,
        row_alignment=row_alignment,
        out_dtype=jnp.dtype(dtype),
    )


def grouped_swiglu_linear(
    gate_up: Float[Array, "M 2*width"],
    weights: Float[Array, "E out width"] | Fp8Weight,
    group_sizes: Int[Array, " E"] | None,
    *,
    row_alignment: int,
    precision: Precision,
) -> Float[Array, "M out"]:
    """Returns y_r = W_e (silu(gate_r) * up_r); each row of `gate_up` holds its gate part, then its up part."""
    if precision.fp8 is None:
        hidden = swiglu(keep(gate_up).reshape(gate_up.shape[0], 2, -1))
        return grouped_linear(hidden, weights, group_sizes, row_alignment=row_alignment, precision=precision)
    assert group_sizes is not None
    role = Role(swiglu=True, gradient_dispatched=True)
    return _fp8_by_group(gate_up.astype(precision.dtype), weights, group_sizes, row_alignment, precision, role)


def linear_by_row(
    rows: Float[Array, "S in"],
    weights: Float[Array, "S out in"] | Fp8Weight,
    precision: Precision,
    *,
    after_swiglu: bool = False,
) -> Float[Array, "S out"]:
    """Returns y_s = W_s x_s for a matrix of each row's own, in the formats of `grouped_linear`. Not differentiable.

    Args:
      after_swiglu: the rows [S, 2 * in] are the input of SwiGLU, as those of `grouped_swiglu_linear`.
    """
    rows = rows.astype(precision.dtype)
    if precision.fp8 is not None:
        role = Role(swiglu=True, gradient_dispatched=True) if after_swiglu else Role(dispatched=True)
        return fp8_product_by_row(rows, weights, precision.fp8, role)
    if after_swiglu:
        rows = swiglu(rows.reshape(rows.shape[0], 2, -1))
    return jnp.einsum("sk,snk->sn", rows, weights.astype(precision.dtype))


def rounded_weight(weight: Float[Array, "*out in"] | Fp8Weight, precision: Precision) -> Float[Array, "*out in"]:
    """Returns a weight in the recipe's dtype, rounded to FP8 before where the recipe's products multiply by FP8.

    Decoding multiplies by the absorbed up-projections in the recipe's dtype, as the published inference code does with
    weights that it dequantizes.
    """
    recipe = precision.fp8
    if recipe is None or recipe.forward == "none" or isinstance(weight, Fp8Weight):
        return weight.astype(precision.dtype)
    matrix = weight.reshape(-1, weight.shape[-1])
    return dequantize(weight_tiles(matrix, recipe)).astype(precision.dtype).reshape(weight.shape)


def _fp8_by_group(
    rows: Float[Array, "M in"] | QuantizedRows,
    weights: Float[Array, "E out in"] | Fp8Weight,
    group_sizes: Int[Array, " E"],
    row_alignment: int,
    precision: Precision,
    role: Role,
) -> Float[Array, "M out"]:
    """Returns the FP8 product; groups that are not whole tiles are padded to them first, and the padding is dropped."""
    assert precision.fp8 is not None
    if row_alignment % TILE == 0:
        return fp8_product(rows, weights, group_sizes, precision.fp8, role)
    layout = align(rows.shape[0], group_sizes, TILE)
    wide = jax.tree.map(lambda part: take_rows(part, layout.source), rows)
    return take_rows(fp8_product(wide, weights, layout.group_sizes, precision.fp8, role), layout.destination)
