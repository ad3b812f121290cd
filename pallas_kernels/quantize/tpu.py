"""Quantization on TPUs, in Mosaic TPU: tiles of 128 x 128 in VMEM, each value of `x` read from HBM once.

A grid step has 128 rows and up to eight tiles of columns. Scales are written as [tiles along the contraction, 1, rows]
with rows along the lanes: a column of scales becomes a row by transposing its broadcast, which the transpose unit does
while the vector unit works. `interpret` is for tests on a CPU.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.device import once_a_program
from pallas_kernels.quantize.quantized import E4M3, TILE, Quantized, Tile
from pallas_kernels.quantize.reference import magnitude_bits, reciprocal, scales_from_magnitude, values_from_scaled

MAX_TILES = 8  # tiles of columns in one grid step

Interpret = pltpu.InterpretParams | None


@once_a_program("tile", "power_of_two_scales")
def quantize(
    x: Float[Array, "M K"], tile: Tile, power_of_two_scales: bool, *, interpret: Interpret = None
) -> Quantized:
    """Computes `reference.quantize` for one matrix. "128x1" is quantized transposed and then transposed by a copy."""
    if tile == "128x128":
        return _quantize_blocks(x, power_of_two_scales, interpret)
    if tile == "1x128":
        return _quantize_tiles(x, power_of_two_scales, interpret, rows=True, columns=False)[0]
    return _quantize_tiles(x, power_of_two_scales, interpret, rows=False, columns=True)[0].mT


@once_a_program("power_of_two_scales")
def quantize_both(
    x: Float[Array, "M K"], power_of_two_scales: bool, *, interpret: Interpret = None
) -> tuple[Quantized, Quantized]:
    """Returns `x` and its transpose, both in 1x128 tiles, reading `x` once."""
    rows, columns = _quantize_tiles(x, power_of_two_scales, interpret, rows=True, columns=True)
    return rows, columns


@once_a_program("power_of_two_scales")
def requantize_transposed(q: Quantized, power_of_two_scales: bool, *, interpret: Interpret = None) -> Quantized:
    """Returns the transpose of `q` (1x128 tiles), quantized again in 1x128 tiles."""
    m, k = q.shape
    grid, width = _grid(m, k)
    values, scales = pl.pallas_call(
        functools.partial(_requantize_kernel, shape=(m, k), power_of_two=power_of_two_scales),
        grid=grid,
        in_specs=[
            pl.BlockSpec((TILE, width), lambda i, j: (i, j)),
            pl.BlockSpec((width // TILE, 1, TILE), lambda i, j: (j, 0, i)),
        ],
        out_specs=[transposed_spec(width), column_scales_spec(width)],
        out_shape=[jax.ShapeDtypeStruct((k, m), E4M3), scales_struct(m, k)],
        interpret=interpret or False,
        name="requantize_transposed",
    )(q.values, q.scales.T[:, None])
    return Quantized(values, scales[:, 0].T, "1x128")


def _quantize_tiles(x, power_of_two, interpret, *, rows: bool, columns: bool) -> list[Quantized]:
    """Quantizes along the rows, or along the columns (transposed), or both in this order."""
    m, k = x.shape
    grid, width = _grid(m, k)
    out_specs: list[Any] = []
    out_shape: list[Any] = []
    if rows:
        out_specs += [
            pl.BlockSpec((TILE, width), lambda i, j: (i, j)),
            pl.BlockSpec((width // TILE, 1, TILE), lambda i, j: (j, 0, i)),
        ]
        out_shape += [jax.ShapeDtypeStruct((m, k), E4M3), scales_struct(k, m)]
    if columns:
        out_specs += [transposed_spec(width), column_scales_spec(width)]
        out_shape += [jax.ShapeDtypeStruct((k, m), E4M3), scales_struct(m, k)]
    outs = pl.pallas_call(
        functools.partial(_tiles_kernel, shape=(m, k), rows=rows, columns=columns, power_of_two=power_of_two),
        grid=grid,
        in_specs=[pl.BlockSpec((TILE, width), lambda i, j: (i, j))],
        out_specs=out_specs,
        out_shape=out_shape,
        interpret=interpret or False,
        name="quantize_tiles",
    )(x)
    return [Quantized(outs[i], outs[i + 1][:, 0].T, "1x128") for i in range(0, len(outs), 2)]


def _quantize_blocks(x, power_of_two, interpret) -> Quantized:
    m, k = x.shape
    grid, width = _grid(m, k)
    # A block's scale is written to 128 lanes, the least a vector store can do, and read from one.
    lanes = pl.cdiv(k, TILE) * TILE
    values, scales = pl.pallas_call(
        functools.partial(_blocks_kernel, shape=(m, k), power_of_two=power_of_two),
        grid=grid,
        in_specs=[pl.BlockSpec((TILE, width), lambda i, j: (i, j))],
        out_specs=[pl.BlockSpec((TILE, width), lambda i, j: (i, j)), column_scales_spec(width)],
        out_shape=[jax.ShapeDtypeStruct((m, k), E4M3), scales_struct(m, lanes)],
        interpret=interpret or False,
        name="quantize_blocks",
    )(x)
    return Quantized(values, scales[:, 0, ::TILE], "128x128")


def _grid(m: int, k: int) -> tuple[tuple[int, int], int]:
    """Returns the grid, and the columns of one grid step."""
    tiles = pl.cdiv(k, TILE)
    width = TILE * math.gcd(tiles, MAX_TILES)
    return (pl.cdiv(m, TILE), pl.cdiv(k, width)), width


def scales_struct(contraction: int, others: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((pl.cdiv(contraction, TILE), 1, others), jnp.float32)


def transposed_spec(width: int) -> pl.BlockSpec:
    return pl.BlockSpec((width, TILE), lambda i, j: (j, i))


def column_scales_spec(width: int) -> pl.BlockSpec:
    return pl.BlockSpec((1, 1, width), lambda i, j: (i, 0, j))


def _tiles_kernel(x_ref, *out_refs, shape, rows, columns, power_of_two):
    for t in range(x_ref.shape[1] // TILE):
        at = pl.ds(t * TILE, TILE)
        x = _without_outside(x_ref[:, at].astype(jnp.float32), t, shape)
        if rows:
            quantize_tile_rows(x, out_refs[0].at[:, at], out_refs[1].at[t], power_of_two)
        if columns:
            quantize_columns(x, out_refs[-2].at[at], out_refs[-1].at[0, :, at], power_of_two)


def _requantize_kernel(q_ref, scales_ref, values_ref, out_scales_ref, *, shape, power_of_two):
    for t in range(q_ref.shape[1] // TILE):
        at = pl.ds(t * TILE, TILE)
        x = q_ref[:, at].astype(jnp.float32) * jnp.broadcast_to(scales_ref[t], (TILE, TILE)).T
        quantize_columns(_without_outside(x, t, shape), values_ref.at[at], out_scales_ref.at[0, :, at], power_of_two)


def _blocks_kernel(x_ref, values_ref, scales_ref, *, shape, power_of_two):
    for t in range(x_ref.shape[1] // TILE):
        at = pl.ds(t * TILE, TILE)
        x = _without_outside(x_ref[:, at].astype(jnp.float32), t, shape)
        bits = jnp.max(jnp.max(magnitude_bits(x), axis=0, keepdims=True), axis=1, keepdims=True)
        scale = scales_from_magnitude(jnp.broadcast_to(bits, (1, TILE)), power_of_two)
        values_ref[:, at] = values_from_scaled(x * reciprocal(scale))
        scales_ref[0, :, at] = scale


def quantize_tile_rows(x: Float[Array, "128 128"], values_ref, scales_ref, power_of_two: bool) -> None:
    """Writes a tile with one scale per row of the tile."""
    scales = scales_from_magnitude(jnp.max(magnitude_bits(x), axis=1, keepdims=True), power_of_two)
    values_ref[...] = values_from_scaled(x * reciprocal(scales))
    scales_ref[...] = _as_row(scales)


def quantize_columns(x, values_ref, scales_ref, power_of_two) -> None:
    """Writes the transpose of a tile, with one scale per column of the tile."""
    scales = scales_from_magnitude(jnp.max(magnitude_bits(x), axis=0, keepdims=True), power_of_two)
    values_ref[...] = (jnp.clip(x * reciprocal(scales), -448, 448)).T.astype(E4M3)
    scales_ref[...] = scales


def _as_row(column: Float[Array, "128 1"]) -> Float[Array, "1 128"]:
    return jnp.broadcast_to(column, (TILE, TILE)).T[:1]


def _without_outside(x: Float[Array, "128 128"], t: int, shape: tuple[int, int]) -> Float[Array, "128 128"]:
    """Returns `x` with zeros past the matrix's edges, where VMEM is not initialized."""
    m, k = shape
    if m % TILE == 0 and k % TILE == 0:
        return x
    tiles_per_step = math.gcd(pl.cdiv(k, TILE), MAX_TILES)
    row = lax.broadcasted_iota(jnp.int32, x.shape, 0) + pl.program_id(0) * TILE
    column = lax.broadcasted_iota(jnp.int32, x.shape, 1) + (pl.program_id(1) * tiles_per_step + t) * TILE
    return jnp.where((row < m) & (column < k), x, 0)
