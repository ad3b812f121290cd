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
from typing import Any

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
from dsv3_jax.precision.products import columns_by_columns, rows_by_own_weights, rows_by_weights
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
    constant = isinstance(weights, Fp8Weight)
    stored = weights.tiles() if constant else weight_tiles(weights, recipe)
    tiles, _ = _input_tiles(x, None, recipe, role)
    out = rows_by_own_weights(tiles, stored, promotion=recipe.promotion, out_dtype=x.dtype)
    return weights.unpad(out) if constant else out


def weight_tiles(weight: Float[Array, "*E out in"], recipe: Fp8Recipe) -> Tiles:
    """Returns a weight as the recipe's products multiply by it: e4m3 in square blocks."""
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
    return _forward(x, prepared, weight, group_sizes, recipe, role)[0]


def _forward(
    x: Array,
    prepared: Tiles | PackedE5M6 | None,
    weight: Array | Fp8Weight,
    group_sizes: Array | None,
    recipe: Fp8Recipe,
    role: Role,
) -> tuple[Array, Any]:
    tiles, cache = _input_tiles(x, prepared, recipe, role)
    constant = isinstance(weight, Fp8Weight)
    stored = weight.tiles() if constant else weight_tiles(weight, recipe)
    if recipe.forward == "none":
        out = _plain_product(_activated(x) if role.swiglu else x, weight, group_sizes)
    else:
        out = rows_by_weights(tiles, stored, group_sizes, promotion=recipe.promotion, out_dtype=x.dtype)
        out = weight.unpad(out) if constant else out
    # What the input gradient needs of W. The array of the gradient's dtype is empty, as residuals must be arrays.
    if constant:
        kept_weight = dataclasses.replace(weight, gradient=None)
        like = None if weight.gradient is None else jnp.empty(0, weight.gradient.dtype)
    else:
        kept_weight = weight if recipe.input_gradient == "none" else stored
        like = jnp.empty(0, weight.dtype)
    if like is None and not role.swiglu:
        cache = None  # the input serves the weight gradient, which a constant has none of, and that of SwiGLU
    return out, (cache, kept_weight, group_sizes, like)


def _backward(
    recipe: Fp8Recipe, role: Role, residuals: Any, out_bar: Array
) -> tuple[Array, None, Float[Array, "..."] | Fp8Weight | None, None]:
    cache, weight, group_sizes, like = residuals
    for_rows, for_columns = _gradient_tiles(out_bar, weight, recipe, role, for_weights=like is not None)
    x_bar = _input_gradient(weight, out_bar, for_rows, group_sizes, recipe)
    if for_columns is not None and _fuses_swiglu(2 * x_bar.shape[1], recipe, role):
        x_bar, columns = pk.swiglu_gradient(cache, x_bar, power_of_two_scales=_rounded_scales(recipe, role))
        weight_bar = columns_by_columns(for_columns, columns.mT, group_sizes, promotion=recipe.promotion)
        return x_bar, None, _gradient_by(weight, weight_bar, like.dtype), None
    before = None if cache is None else _restored(cache, out_bar.dtype)
    operand, pull = jax.vjp(_activated, before) if role.swiglu else (before, None)
    if pull is not None:
        (x_bar,) = pull(x_bar)
    if like is None:
        return x_bar, None, None, None
    assert operand is not None
    weight_bar = _weight_gradient(operand, cache, out_bar, for_columns, group_sizes, recipe, role)
    return x_bar, None, _gradient_by(weight, weight_bar, like.dtype), None


_product.defvjp(_forward, _backward)


def _gradient_by(weight: Array | Tiles | Fp8Weight, bar: Float[Array, "..."], dtype: jnp.dtype) -> Array | Fp8Weight:
    """Returns the gradient by a weight as its type has it: an `Fp8Weight` in its field `gradient`, else an array."""
    bar = bar.astype(dtype)
    if not isinstance(weight, Fp8Weight):
        return bar
    nothing = jax.tree.map(jnp.zeros_like, weight)
    return dataclasses.replace(nothing, gradient=bar.reshape(weight.values.shape))


def _gradient_tiles(
    out_bar: Float[Array, "M out"],
    weight: Array | Tiles | Fp8Weight,
    recipe: Fp8Recipe,
    role: Role,
    *,
    for_weights: bool,
) -> tuple[Tiles | None, Tiles | None]:
    """Returns dY in the tiles of the input gradient and in those of the weight gradient; None where dY stays as it is.

    Where both are the report's (1x128 and 128x1 in e4m3, under one rule for scales), dY is read once for both.
    """
    powers = recipe.power_of_two_scales
    row_powers = powers or (role.gradient_dispatched and recipe.dispatch)
    row_tile = _square(recipe) if recipe.block_wise_gradients else _along_row(recipe)
    column_tile = _along_column(recipe)
    row_format, column_format = recipe.input_gradient, recipe.weight_gradient
    if isinstance(weight, Fp8Weight):
        out_bar = weight.pad(out_bar)
    if not for_weights:
        column_format = "none"
    report = row_format == column_format == "e4m3" and (row_tile, column_tile) == ((1, TILE), (TILE, 1))
    if report and row_powers == powers:
        rows, columns = pk.quantize_both(out_bar, power_of_two_scales=powers)
        return rows, columns.mT
    rows = quantize(out_bar, row_tile, row_format, power_of_two=row_powers) if row_format != "none" else None
    columns = quantize(out_bar, column_tile, column_format, power_of_two=powers) if column_format != "none" else None
    return rows, columns


def _input_gradient(
    weight: Array | Tiles | Fp8Weight,
    out_bar: Float[Array, "M out"],
    tiles: Tiles | None,
    group_sizes: Array | None,
    recipe: Fp8Recipe,
) -> Float[Array, "M in"]:
    if tiles is None:
        return _plain_product(out_bar, weight.astype(out_bar.dtype).mT, group_sizes)  # pyright: ignore
    stored = weight.tiles() if isinstance(weight, Fp8Weight) else weight
    assert not isinstance(stored, jax.Array)
    return rows_by_weights(tiles, stored.mT, group_sizes, promotion=recipe.promotion, out_dtype=out_bar.dtype)


def _weight_gradient(
    operand: Array,
    cache: Any,
    out_bar: Float[Array, "M out"],
    tiles: Tiles | None,
    group_sizes: Array | None,
    recipe: Fp8Recipe,
    role: Role,
) -> Float[Array, "..."]:
    if tiles is None:
        if group_sizes is None:
            return jnp.einsum("mn,mk->nk", out_bar, operand, preferred_element_type=jnp.float32)
        return pk.grouped_weight_gradient(out_bar, operand, group_sizes, row_alignment=TILE)
    tile = _along_column(recipe)
    powers = _rounded_scales(recipe, role)
    if isinstance(cache, pk.Quantized) and tile == (TILE, 1) and not role.swiglu:
        columns = pk.requantize_transposed(cache, power_of_two_scales=powers).mT
    else:
        columns = quantize(operand, tile, "e4m3", power_of_two=powers)
    return columns_by_columns(tiles, columns, group_sizes, promotion=recipe.promotion)


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


def _cached(x: Array, tiles: Tiles, recipe: Fp8Recipe, role: Role) -> Any:
    """Returns what is kept of x for the backward pass."""
    if role.swiglu:
        if not recipe.cache_swiglu_input:
            return _kept(x)
        return _kept(quantize(x, _along_row(recipe), "e4m3", power_of_two=False))
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
