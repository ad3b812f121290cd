"""A linear map in FP8, for one matrix or one per expert, with its gradients (report section 3.3, figure 6).

    forward          Y  = X Wᵀ    X 1x128 along its width, W 128x128
    input gradient   dX = dY W    dY 1x128 along its width, W 128x128
    weight gradient  dW = dYᵀ X   dY and X 128x1, along the tokens

The map keeps for the backward pass (section 3.3.3): W in FP8; X in the FP8 tiles of the forward product, re-tiled when
the weight gradient needs it; after attention X in 12 bits; after SwiGLU not X but the input of SwiGLU, in FP8. The
whole recipe is in this file: every `if` on a recipe is a field of `Fp8Recipe`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import pallas_kernels as pk
from dsv3_jax.precision.attended import AttendedRows
from dsv3_jax.precision.e5m6 import PackedE5M6, pack, unpack
from dsv3_jax.precision.fp8_recipe import Fp8Recipe, Role
from dsv3_jax.precision.fp8_weight import Fp8Weight
from dsv3_jax.precision.keeping import keep
from dsv3_jax.precision.prepared import PreparedRows, QuantizedRows
from dsv3_jax.precision.products import (
    grouped_product_over_rows,
    product_over_rows,
    rows_by_own_weights,
    rows_by_weights,
)
from dsv3_jax.precision.swiglu import swiglu
from dsv3_jax.precision.tiles import EmulatedTiles, Tiles, dequantize, quantize
from pallas_kernels import TILE


@jax.named_scope("fp8_matmul")
def fp8_product(
    x: Float[Array, "M in"] | PreparedRows,
    weight: Float[Array, "..."] | Fp8Weight,
    group_sizes: Int[Array, " E"] | None,
    recipe: Fp8Recipe,
    role: Role,
) -> Float[Array, "M out"]:
    """Returns x Wᵀ in the dtype of x under the recipe; swiglu(x) Wᵀ, x being [M, 2 * in], where the role says so.

    Args:
      x: rows; or rows [M, in] that are quantized as the recipe has it already; or those of attention, kept for the
        backward pass already.
      weight: [out, in], or [E, out, in] with groups. An `Fp8Weight` is multiplied as stored, in blocks of 128 x 128
        whatever the recipe's tile.
      group_sizes: rows of each expert, multiples of 128; None for one matrix.
    """
    if isinstance(x, QuantizedRows):
        rows, prepared = x.rows, x.tiles
    else:
        rows, prepared = (x.rows, x.packed) if isinstance(x, AttendedRows) else (x, None)
    return _product(rows, prepared, weight, group_sizes, recipe, role)


@jax.named_scope("fp8_matmul")
def fp8_product_by_row(
    x: Float[Array, "S in"], weights: Float[Array, "S out in"] | Fp8Weight, recipe: Fp8Recipe, role: Role
) -> Float[Array, "S out"]:
    """Returns W_s x_s for a matrix of each row's own, in the formats of `fp8_product`. It is not differentiable."""
    if recipe.forward == "none":
        operand = _activated(x) if role.swiglu else x
        return jnp.einsum("sk,snk->sn", operand, weights.astype(x.dtype))
    tiles, _ = _input_tiles(x, None, recipe, role)
    stored = weight_tiles(weights, recipe)
    out = rows_by_own_weights(tiles, stored, promotion=recipe.promotion, out_dtype=x.dtype)
    return weights.unpad(out) if isinstance(weights, Fp8Weight) else out


def weight_tiles(weight: Float[Array, "*E out in"] | Fp8Weight, recipe: Fp8Recipe) -> Tiles:
    """Returns a weight as the recipe's products multiply by it: e4m3 in square blocks."""
    if isinstance(weight, Fp8Weight):
        return weight.tiles()
    return quantize(weight, _square(recipe), "e4m3", power_of_two=False)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _product(
    x: Array,
    prepared: Tiles | PackedE5M6 | None,
    weight: Array | Fp8Weight,
    group_sizes: Array | None,
    recipe: Fp8Recipe,
    role: Role,
) -> Any:
    return forward(x, prepared, weight, group_sizes, recipe, role)[0]


class Residuals(NamedTuple):
    """What a map keeps for its backward pass.

    Attributes:
      input: what is kept of x; None where nothing is needed.
      weight: what the input gradient needs of W.
      group_sizes: rows of each expert; None for one matrix.
      like: an empty array of the dtype of the gradient by W; None for a constant.
    """

    input: Any
    weight: Array | Tiles | Fp8Weight
    group_sizes: Array | None
    like: Array | None

    @classmethod
    def of(
        cls,
        kept: Any,
        weight: Array | Fp8Weight,
        stored: Tiles,
        group_sizes: Array | None,
        recipe: Fp8Recipe,
        role: Role,
    ) -> Residuals:
        """Returns what is kept of a map with this weight, in FP8 `stored`, whose input is kept as `kept`."""
        if isinstance(weight, Fp8Weight):
            of_weight: Any = dataclasses.replace(weight, gradient=None)
            like = None if weight.gradient is None else jnp.empty(0, weight.gradient.dtype)
        else:
            of_weight = weight if recipe.input_gradient == "none" else stored
            like = jnp.empty(0, weight.dtype)
        if like is None and not role.swiglu:
            kept = None  # the input serves the weight gradient, which a constant has none of, and that of SwiGLU
        return cls(kept, of_weight, group_sizes, like)


def forward(
    x: Array,
    prepared: Tiles | PackedE5M6 | None,
    weight: Array | Fp8Weight,
    group_sizes: Array | None,
    recipe: Fp8Recipe,
    role: Role,
) -> tuple[Array, Residuals]:
    """Returns the product and what its gradients need; arguments are those of `fp8_product`.

    Args:
      prepared: x in FP8, in whose place x is not read; or what is kept of x already.
    """
    tiles, kept = _input_tiles(x, prepared, recipe, role)
    stored = weight_tiles(weight, recipe)
    residuals = Residuals.of(kept, weight, stored, group_sizes, recipe, role)
    if recipe.forward == "none":
        return _plain_product(_activated(x) if role.swiglu else x, weight, group_sizes), residuals
    out = rows_by_weights(tiles, stored, group_sizes, promotion=recipe.promotion, out_dtype=x.dtype)
    return weight.unpad(out) if isinstance(weight, Fp8Weight) else out, residuals


def _backward(
    recipe: Fp8Recipe, role: Role, residuals: Residuals, out_bar: Array
) -> tuple[Array, None, Float[Array, "..."] | Fp8Weight | None, None]:
    x_bar, _, operands = input_gradient(residuals, out_bar, recipe, role, out_bar.dtype)
    if operands is None or residuals.like is None:
        return x_bar, None, None, None
    weight_bar = weight_gradient(operands, residuals.group_sizes, recipe)
    return x_bar, None, gradient_by(residuals.weight, weight_bar, residuals.like.dtype), None


_product.defvjp(forward, _backward)


def input_gradient(
    residuals: Residuals,
    out_bar: Float[Array, "M out"] | Tiles,
    recipe: Fp8Recipe,
    role: Role,
    dtype: jnp.dtype,
    gates: Float[Array, " M"] | None = None,
) -> tuple[Float[Array, "M in"], Float[Array, " M"] | None, tuple[Any, Any] | None]:
    """Returns the first half of the backward pass: the gradient by x, and what the gradient by W is computed from.

    Args:
      out_bar: the gradient of the result, or of `gates` times the result; in FP8 if it arrived so.
      dtype: that of the gradient by x.
      gates: a factor for each row of the result of a map after SwiGLU.

    Returns:
      The gradients by x and by the gates (None without), and the operands of `weight_gradient`, None for a constant.
    """
    kept = residuals.input
    for_rows, for_columns = _gradient_tiles(out_bar, residuals, gates, recipe, role, dtype)
    x_bar = _by_weight(residuals, out_bar, for_rows, recipe, dtype)
    gates_bar = None
    if gates is not None:
        # The sum of the result times its gradient is that of the input times this, so no result is computed again.
        wide, operand = x_bar.astype(gates.dtype), _activated(_restored(kept, dtype)).astype(gates.dtype)
        gates_bar, x_bar = jnp.sum(operand * wide, axis=1), (wide * gates[:, None]).astype(dtype)
    if for_columns is not None and _fuses_swiglu(2 * x_bar.shape[1], recipe, role):
        x_bar, columns = pk.swiglu_gradient(kept, x_bar, power_of_two_scales=_rounded_scales(recipe, role))
        return x_bar, gates_bar, (for_columns, columns)
    before = None if kept is None else _restored(kept, dtype)
    operand, pull = jax.vjp(_activated, before) if role.swiglu else (before, None)
    if pull is not None:
        (x_bar,) = pull(x_bar)
    if residuals.like is None:
        return x_bar, gates_bar, None
    if for_columns is None:
        return x_bar, gates_bar, (_gated(out_bar, gates, dtype), operand)
    tile, powers = _along_column(recipe), _rounded_scales(recipe, role)
    if isinstance(kept, pk.Quantized) and tile == (TILE, 1) and not role.swiglu:
        return x_bar, gates_bar, (for_columns, pk.requantize_transposed(kept, power_of_two_scales=powers))
    assert operand is not None
    return x_bar, gates_bar, (for_columns, quantize(operand, tile, "e4m3", power_of_two=powers).mT)


def weight_gradient(
    operands: tuple[Any, Any],
    group_sizes: Int[Array, "*P E"] | None,
    recipe: Fp8Recipe,
    accumulator: Float[Array, "E out in"] | None = None,
) -> Float[Array, "..."]:
    """Returns the second half of the backward pass, the gradient by W (+ accumulator) in float32.

    Args:
      operands: what `input_gradient` returned; with groups they may have a leading axis of parts, as `group_sizes` has.
      accumulator: float32; only with groups.
    """
    left, right = operands
    if group_sizes is None:
        if isinstance(left, jax.Array):
            return jnp.einsum("mn,mk->nk", left, right, preferred_element_type=jnp.float32)
        return product_over_rows(left, right, promotion=recipe.promotion)
    if isinstance(left, jax.Array):
        return pk.grouped_weight_gradient(left, right, group_sizes, accumulator=accumulator, row_alignment=TILE)
    return grouped_product_over_rows(left, right, group_sizes, promotion=recipe.promotion, accumulator=accumulator)


def gradient_by(weight: Array | Tiles | Fp8Weight, bar: Float[Array, "..."], dtype: jnp.dtype) -> Array | Fp8Weight:
    """Returns the gradient by a weight as its type has it: an `Fp8Weight` in its field `gradient`, else an array."""
    bar = bar.astype(dtype)
    if not isinstance(weight, Fp8Weight):
        return bar
    nothing = jax.tree.map(jnp.zeros_like, weight)
    return dataclasses.replace(nothing, gradient=bar.reshape(weight.values.shape))


def _gradient_tiles(
    out_bar: Float[Array, "M out"] | Tiles,
    residuals: Residuals,
    gates: Float[Array, " M"] | None,
    recipe: Fp8Recipe,
    role: Role,
    dtype: jnp.dtype,
) -> tuple[Tiles | None, Tiles | None]:
    """Returns dY in the tiles of the input gradient; and times its gates, transposed, in those of the weight gradient.

    They are None where dY stays as it is. Where both are the report's (1x128 and 128x1 in e4m3, under one rule for
    scales), an array is read once for both.
    """
    powers = recipe.power_of_two_scales
    row_powers = powers or (role.gradient_dispatched and recipe.dispatch)
    row_tile = _square(recipe) if recipe.block_wise_gradients else _along_row(recipe)
    column_tile = _along_column(recipe)
    row_format, column_format = recipe.input_gradient, recipe.weight_gradient
    if residuals.like is None:
        column_format = "none"
    report = row_format == column_format == "e4m3" and (row_tile, column_tile) == ((1, TILE), (TILE, 1))
    if isinstance(out_bar, pk.Quantized) and report:
        gated = out_bar if gates is None else dataclasses.replace(out_bar, scales=out_bar.scales * gates[:, None])
        return out_bar, pk.requantize_transposed(gated, power_of_two_scales=powers)
    rows: Any = out_bar
    columns = None
    if isinstance(out_bar, jax.Array):
        if isinstance(residuals.weight, Fp8Weight):
            out_bar = residuals.weight.pad(out_bar)
        if report and row_powers == powers and gates is None:
            return pk.quantize_both(out_bar, power_of_two_scales=powers)
        rows = quantize(out_bar, row_tile, row_format, power_of_two=row_powers) if row_format != "none" else None
    if column_format != "none":
        columns = quantize(_gated(out_bar, gates, dtype), column_tile, column_format, power_of_two=powers).mT
    return rows, columns


def _gated(out_bar: Array | Tiles, gates: Float[Array, " M"] | None, dtype: jnp.dtype) -> Float[Array, "M out"]:
    """Returns dY, or dY times the gates, as an array."""
    array = out_bar if isinstance(out_bar, jax.Array) else dequantize(out_bar).astype(dtype)
    return array if gates is None else (array.astype(gates.dtype) * gates[:, None]).astype(dtype)


def _by_weight(
    residuals: Residuals, out_bar: Array | Tiles, tiles: Tiles | None, recipe: Fp8Recipe, dtype: jnp.dtype
) -> Float[Array, "M in"]:
    """Returns dY W."""
    weight, sizes = residuals.weight, residuals.group_sizes
    if tiles is None:
        return _plain_product(_gated(out_bar, None, dtype), weight.astype(dtype).mT, sizes)  # pyright: ignore
    assert not isinstance(weight, jax.Array)
    by_input = weight.tiles_by_input() if isinstance(weight, Fp8Weight) else weight.mT
    return rows_by_weights(tiles, by_input, sizes, promotion=recipe.promotion, out_dtype=dtype)


def _input_tiles(
    x: Float[Array, "M ..."], prepared: Tiles | PackedE5M6 | None, recipe: Fp8Recipe, role: Role
) -> tuple[Tiles, Any]:
    """Returns the map's input in FP8, and what is kept of x for the backward pass.

    Args:
      prepared: x in FP8, in whose place x is not read; or what is kept of x already.
    """
    if isinstance(prepared, pk.Quantized | EmulatedTiles):
        return prepared, prepared
    powers = _rounded_scales(recipe, role)
    if _fuses_swiglu(x.shape[1], recipe, role):
        tiles, kept = pk.quantize_swiglu(x, power_of_two_scales=powers)
        return tiles, _kept(kept)
    tiles = quantize(_activated(x) if role.swiglu else x, _along_row(recipe), "e4m3", power_of_two=powers)
    return tiles, _cached(x, tiles, recipe, role) if prepared is None else prepared


def _fuses_swiglu(width: int, recipe: Fp8Recipe, role: Role) -> bool:
    """Returns whether SwiGLU of an array so wide is computed together with quantization, in whole tiles of 128."""
    report = recipe.tile == TILE and recipe.forward == "e4m3" and recipe.cache_swiglu_input
    return role.swiglu and report and width % (2 * TILE) == 0


def _rounded_scales(recipe: Fp8Recipe, role: Role) -> bool:
    """Returns whether the input's scales are powers of two, as they are after attention and after dispatch (3.3.3)."""
    behind_attention = role.after_attention and recipe.after_attention == "e5m6"
    return recipe.power_of_two_scales or behind_attention or (role.dispatched and recipe.dispatch)


def kept_before_swiglu(x: Float[Array, "M 2*width"], recipe: Fp8Recipe) -> Any:
    """Returns what a map after SwiGLU keeps of its input for the backward pass."""
    if not recipe.cache_swiglu_input:
        return _kept(x)
    return _kept(quantize(x, _along_row(recipe), "e4m3", power_of_two=False))


def _cached(x: Array, tiles: Tiles, recipe: Fp8Recipe, role: Role) -> Any:
    """Returns what is kept of x for the backward pass."""
    if role.swiglu:
        return kept_before_swiglu(x, recipe)
    if role.after_attention:
        return _kept({"e5m6": lambda: pack(x), "e4m3": lambda: tiles, "none": lambda: x}[recipe.after_attention]())
    return tiles if recipe.cache_activations else x


def _kept(cache: Any) -> Any:
    return jax.tree.map(keep, cache)


def _restored(cache: Any, dtype: jnp.dtype) -> Float[Array, "M in"]:
    if isinstance(cache, PackedE5M6):
        return unpack(cache).astype(dtype)
    return cache if isinstance(cache, jax.Array) else dequantize(cache).astype(dtype)


def _activated(x: Float[Array, "M 2*width"]) -> Float[Array, "M width"]:
    return swiglu(x.reshape(x.shape[0], 2, -1))


def _plain_product(x: Array, weight: Array | Fp8Weight, group_sizes: Array | None) -> Float[Array, "M out"]:
    weight = weight.astype(x.dtype)
    if group_sizes is None:
        return jnp.einsum("mk,nk->mn", x, weight)
    return pk.grouped_matmul(x, weight, group_sizes, row_alignment=TILE)


def _along_row(recipe: Fp8Recipe) -> tuple[int, int]:
    return (1, recipe.tile) if recipe.tile else (0, 0)


def _along_column(recipe: Fp8Recipe) -> tuple[int, int]:
    return (recipe.tile, 1) if recipe.tile else (0, 0)


def _square(recipe: Fp8Recipe) -> tuple[int, int]:
    return (recipe.tile, recipe.tile)
