"""Quantization on Hopper, in Mosaic GPU: each value is read from global memory once, by TMA.

A block is one warpgroup and works on tiles of 128 x 128. Reading a tile row-wise gives the 1x128 tiles; reading the
same shared memory transposed (ldmatrix does that for bfloat16 at no cost) gives the tiles along the columns with the
same arithmetic: a row of registers is then a column of `x`. Nothing is reused, so there is no ring of stages. Several
blocks share a multiprocessor, and while one computes, the copies of the others proceed.

Scales are written as [tiles along the contraction, rows], the order in which the product reads them; the transposes
to the stored format and from it cancel under jit.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.device import once_a_program
from pallas_kernels.hopper_launch import SHARED_MEMORY_BYTES, multiprocessors, pad_to, swizzled
from pallas_kernels.quantize.quantized import E4M3, TILE, Quantized, Tile
from pallas_kernels.quantize.reference import magnitude_bits, reciprocal, scales_from_magnitude, values_from_scaled

HALF = 64  # rows that a warpgroup has in registers at a time
_MAX_BLOCKS = 4  # blocks per multiprocessor


@once_a_program("tile", "power_of_two_scales")
def quantize(
    x: Float[Array, "M K"],
    tile: Tile,
    power_of_two_scales: bool,
    *,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Quantized:
    """Computes `reference.quantize` for one matrix. "128x1" is quantized transposed and then transposed by a copy."""
    if tile == "128x128":
        return _quantize_blocks(x, power_of_two_scales, interpret)
    if tile == "1x128":
        return _quantize_tiles(x, power_of_two_scales, interpret, rows=True, columns=False)[0]
    return _quantize_tiles(x, power_of_two_scales, interpret, rows=False, columns=True)[0].mT


@once_a_program("power_of_two_scales")
def quantize_both(
    x: Float[Array, "M K"], power_of_two_scales: bool, *, interpret: plgpu.InterpretGPUParams | None = None
) -> tuple[Quantized, Quantized]:
    """Returns `x` and its transpose, both in 1x128 tiles, reading `x` once."""
    rows, columns = _quantize_tiles(x, power_of_two_scales, interpret, rows=True, columns=True)
    return rows, columns


@once_a_program("power_of_two_scales")
def requantize_transposed(
    q: Quantized, power_of_two_scales: bool, *, interpret: plgpu.InterpretGPUParams | None = None
) -> Quantized:
    """Returns the transpose of `q` (1x128 tiles), quantized again in 1x128 tiles."""
    (m, k), values = q.shape, pad_to(q.values, 32, 32)
    rows, columns = values.shape
    kernel = functools.partial(_requantize_kernel, power_of_two=power_of_two_scales)
    out_values, out_scales = launch(
        kernel,
        "requantize_transposed",
        (rows, columns),
        [jax.ShapeDtypeStruct((columns, rows), E4M3), scales_struct(rows, columns)],
        {
            "q_smem": tile_smem(E4M3, columns),
            "scales_smem": plgpu.SMEM((TILE,), jnp.float32),
            "wide_smem": tile_smem(jnp.float16, TILE),
            "values_smem": tile_smem(E4M3, rows),
            "out_scales_smem": plgpu.SMEM((TILE,), jnp.float32),
            "arrived": plgpu.Barrier(num_arrivals=2),
        },
        interpret,
    )(values, pad_to(q.scales.T, TILE))
    return Quantized(cut(out_values, k, m), cut(out_scales, out_scales.shape[0], k).T, "1x128")


def _quantize_tiles(x, power_of_two, interpret, *, rows: bool, columns: bool) -> list[Quantized]:
    """Quantizes along the rows, or along the columns (transposed), or both in this order."""
    (m, k), x = x.shape, pad_to(x, 32 if columns else 8, 32)
    padded_m, padded_k = x.shape
    out_types, scratch = [], {"x_smem": tile_smem(x.dtype, padded_k), "arrived": plgpu.Barrier()}
    for wanted, name, (height, width) in (
        (rows, "rows_smem", (padded_m, padded_k)),
        (columns, "columns_smem", (padded_k, padded_m)),
    ):
        scratch[name] = (tile_smem(E4M3, width), plgpu.SMEM((TILE,), jnp.float32)) if wanted else None
        if wanted:
            out_types += [jax.ShapeDtypeStruct((height, width), E4M3), scales_struct(width, height)]
    kernel = functools.partial(_tiles_kernel, power_of_two=power_of_two)
    name = "quantize_" + "_and_".join(["rows"] * rows + ["columns"] * columns)
    results = launch(kernel, name, x.shape, out_types, scratch, interpret)(x)
    shapes = [(m, k)] * rows + [(k, m)] * columns
    return [
        Quantized(cut(values, *shape), cut(scales, pl.cdiv(shape[1], TILE), shape[0]).T, "1x128")
        for shape, values, scales in zip(shapes, results[::2], results[1::2], strict=True)
    ]


def _quantize_blocks(x, power_of_two, interpret) -> Quantized:
    (m, k), x = x.shape, pad_to(x, 8, 32)
    values, scales = launch(
        functools.partial(_blocks_kernel, power_of_two=power_of_two),
        "quantize_blocks",
        x.shape,
        [
            jax.ShapeDtypeStruct(x.shape, E4M3),
            jax.ShapeDtypeStruct((pl.cdiv(m, TILE), pl.cdiv(k, TILE)), jnp.float32),
        ],
        {
            "x_smem": tile_smem(x.dtype, x.shape[1]),
            "values_smem": tile_smem(E4M3, x.shape[1]),
            "scale_smem": plgpu.SMEM((HALF,), jnp.float32),
            "arrived": plgpu.Barrier(),
        },
        interpret,
    )(x)
    return Quantized(cut(values, m, k), scales, "128x128")


def tile_smem(dtype, extent: int, rows: int = TILE, columns: int = TILE):
    """Returns the buffer for a tile of an array whose rows have `extent` elements."""
    return plgpu.SMEM((rows, columns), dtype, transforms=swizzled(columns, dtype, extent))


def cut(x: Array, rows: int, columns: int) -> Array:
    """Returns the first rows and columns of `x`, which is not copied where these are all."""
    return x if x.shape == (rows, columns) else x[:rows, :columns]


def scales_struct(contraction: int, others: int) -> jax.ShapeDtypeStruct:
    """Returns the type of scales [tiles along the contraction, others]; rows are whole tiles.

    A part of one row is contiguous, and Mosaic copies such a part without TMA's check of the row's end: what is past
    the end would be written to the next row.
    """
    return jax.ShapeDtypeStruct((pl.cdiv(contraction, TILE), others + -others % TILE), jnp.float32)


def launch(
    kernel,
    name: str,
    shape: tuple[int, ...],
    out_types,
    scratch: dict[str, Any],
    interpret,
    tile: tuple[int, int] = (TILE, TILE),
):
    """Returns a launch of `kernel` over a grid of tiles: one warpgroup per block, as many blocks as memory allows."""
    tiles = pl.cdiv(shape[0], tile[0]), pl.cdiv(shape[1], tile[1])
    used = sum(math.prod(s.shape) * s.dtype.itemsize for s in jax.tree.leaves(scratch) if isinstance(s, pl.MemoryRef))
    together = min(SHARED_MEMORY_BYTES // (used + 3072), _MAX_BLOCKS)
    blocks = min(tiles[0] * tiles[1], multiprocessors() * together)
    return plgpu.kernel(
        functools.partial(kernel, tiles=tiles),
        out_type=out_types,
        scratch_types=scratch,
        grid=(blocks,),
        grid_names=("blocks",),
        kernel_name=name,
        interpret=interpret,
    )


def _tiles_kernel(x, *outs, x_smem, rows_smem, columns_smem, arrived, tiles, power_of_two):
    """The program of one block. `outs` are values and scales along the rows, then along the columns, as wanted."""

    @plgpu.nd_loop(tiles, collective_axes="blocks")
    def _(loop):
        i, j = loop.index
        along_m, along_k = pl.ds(i * TILE, TILE), pl.ds(j * TILE, TILE)
        plgpu.copy_gmem_to_smem(x.at[along_m, along_k], x_smem, arrived)
        plgpu.barrier_wait(arrived)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for start in (0, HALF):
            half = pl.ds(start, HALF)
            if rows_smem is not None:
                part = plgpu.load(x_smem.at[half], layout=plgpu.Layout.WGMMA_8BIT)
                quantize_rows(part, rows_smem[0].at[half], rows_smem[1].at[half], power_of_two)
            if columns_smem is not None:
                transposed = x_smem.at[:, half].transpose((1, 0))
                part = plgpu.load(transposed, layout=plgpu.Layout.WGMMA, optimized=False)
                quantize_rows(part, columns_smem[0].at[half], columns_smem[1].at[half], power_of_two)
        plgpu.commit_smem()
        if rows_smem is not None:
            plgpu.copy_smem_to_gmem(rows_smem[0], outs[0].at[along_m, along_k])
            plgpu.copy_smem_to_gmem(rows_smem[1], outs[1].at[j, along_m])
        if columns_smem is not None:
            plgpu.copy_smem_to_gmem(columns_smem[0], outs[-2].at[along_k, along_m])
            plgpu.copy_smem_to_gmem(columns_smem[1], outs[-1].at[i, along_k])

    plgpu.wait_smem_to_gmem(0)


def _requantize_kernel(
    q,
    scales,
    out,
    out_scales,
    *,
    q_smem,
    scales_smem,
    wide_smem,
    values_smem,
    out_scales_smem,
    arrived,
    tiles,
    power_of_two,
):
    """The program of one block. Values are transposed as float16, which holds e4m3 exactly and ldmatrix takes."""

    @plgpu.nd_loop(tiles, collective_axes="blocks")
    def _(loop):
        i, j = loop.index
        along_m, along_k = pl.ds(i * TILE, TILE), pl.ds(j * TILE, TILE)
        plgpu.copy_gmem_to_smem(q.at[along_m, along_k], q_smem, arrived)
        plgpu.copy_gmem_to_smem(scales.at[j, along_m], scales_smem, arrived)
        plgpu.barrier_wait(arrived)
        for start in (0, HALF):
            half = pl.ds(start, HALF)
            wide_smem[half] = plgpu.load(q_smem.at[half], layout=plgpu.Layout.WGMMA_8BIT).astype(jnp.float16)
        row_scales = plgpu.load(scales_smem, layout=plgpu.Layout.WGMMA.reduce(0))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.commit_smem()
        for start in (0, HALF):
            half = pl.ds(start, HALF)
            part = plgpu.load(wide_smem.at[:, half].transpose((1, 0)), layout=plgpu.Layout.WGMMA, optimized=False)
            part = part.astype(jnp.float32) * lax.broadcast_in_dim(row_scales, part.shape, (1,))
            quantize_rows(part, values_smem.at[half], out_scales_smem.at[half], power_of_two)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(values_smem, out.at[along_k, along_m])
        plgpu.copy_smem_to_gmem(out_scales_smem, out_scales.at[i, along_k])

    plgpu.wait_smem_to_gmem(0)


def _blocks_kernel(x, values, scales, *, x_smem, values_smem, scale_smem, arrived, tiles, power_of_two):
    @plgpu.nd_loop(tiles, collective_axes="blocks")
    def _(loop):
        i, j = loop.index
        tile = pl.ds(i * TILE, TILE), pl.ds(j * TILE, TILE)
        plgpu.copy_gmem_to_smem(x.at[tile], x_smem, arrived)
        plgpu.barrier_wait(arrived)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        def half(start):
            return plgpu.load(x_smem.at[pl.ds(start, HALF)], layout=plgpu.Layout.WGMMA_8BIT).astype(jnp.float32)

        largest = jnp.maximum(*(jnp.max(magnitude_bits(half(start)), axis=1) for start in (0, HALF)))
        # A vector, since Mosaic cannot reinterpret the bits of a scalar; one of it is read back from shared memory.
        scale = scales_from_magnitude(lax.broadcast_in_dim(jnp.max(largest), (HALF,), ()), power_of_two)
        scale_smem[...] = scale
        for start in (0, HALF):
            values_smem[pl.ds(start, HALF)] = values_from_scaled(_scale_rows(half(start), scale))
        plgpu.commit_smem()
        scales[i, j] = scale_smem[0]
        plgpu.copy_smem_to_gmem(values_smem, values.at[tile])

    plgpu.wait_smem_to_gmem(0)


def quantize_rows(x: Float[Array, "64 128"], values_smem, scales_smem, power_of_two: bool) -> None:
    """Writes 64 rows in e4m3, and a scale for each."""
    x = x.astype(jnp.float32)
    scales = scales_from_magnitude(jnp.max(magnitude_bits(x), axis=1), power_of_two)
    values_smem[...] = values_from_scaled(_scale_rows(x, scales))
    scales_smem[...] = scales


def _scale_rows(x: Float[Array, "64 128"], scales: Float[Array, " 64"]) -> Float[Array, "64 128"]:
    return x * lax.broadcast_in_dim(reciprocal(scales), x.shape, (0,))
