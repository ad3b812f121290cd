"""Quantisation on Hopper, in Mosaic GPU: each value is read from global memory once, by TMA.

A block is one warpgroup and works on tiles of 128 x 128. Reading a tile row-wise gives the 1x128 tiles; reading the
same shared memory transposed (ldmatrix does that for bfloat16 at no cost) gives the tiles along the columns with the
very same arithmetic, a row of registers being a column of `x`. Nothing is reused, so there is no ring of stages:
several blocks share a multiprocessor, and while one computes the others' copies are under way.

Scales leave as [tiles along the contraction, rows], the order in which the product reads them; the transposes on
either side of the stored format cancel under jit.
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

from pallas_kernels.hopper_launch import SHARED_MEMORY_BYTES, multiprocessors, pad_last, swizzled
from pallas_kernels.quantize.quantized import E4M3, Quantized, Tile
from pallas_kernels.quantize.reference import magnitude_bits, scales_from_magnitude, values_from_scaled

TILE = 128
HALF = 64  # rows of registers a warpgroup holds at a time
_MAX_BLOCKS = 4  # on one multiprocessor


def quantize(
    x: Float[Array, "M K"],
    tile: Tile,
    power_of_two_scales: bool,
    *,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Quantized:
    """As `reference.quantize` for one matrix. "128x1" is quantised transposed and then turned, by a copy."""
    if tile == "128x128":
        return _quantize_blocks(x, power_of_two_scales, interpret)
    if tile == "1x128":
        return _quantize_tiles(x, power_of_two_scales, interpret, rows=True, columns=False)[0]
    return _quantize_tiles(x, power_of_two_scales, interpret, rows=False, columns=True)[0].mT


def quantize_both(
    x: Float[Array, "M K"], power_of_two_scales: bool, *, interpret: plgpu.InterpretGPUParams | None = None
) -> tuple[Quantized, Quantized]:
    """`x` and its transpose, both in 1x128 tiles, from one reading of `x`."""
    rows, columns = _quantize_tiles(x, power_of_two_scales, interpret, rows=True, columns=True)
    return rows, columns


def requantize_transposed(
    q: Quantized, power_of_two_scales: bool, *, interpret: plgpu.InterpretGPUParams | None = None
) -> Quantized:
    """The transpose of `q` (1x128 tiles) quantised anew in 1x128 tiles."""
    m, k = q.shape
    values, scales = pad_last(q.values, 16), pad_last(q.scales.T, TILE)
    rows = m + -m % 16
    kernel = functools.partial(_requantize_kernel, power_of_two=power_of_two_scales)
    out_values, out_scales = _launch(
        kernel,
        "requantize_transposed",
        (m, k),
        [jax.ShapeDtypeStruct((k, rows), E4M3), _scales_struct(m, k)],
        {
            "q_smem": plgpu.SMEM((TILE, TILE), E4M3, transforms=swizzled(TILE, E4M3)),
            "scales_smem": plgpu.SMEM((TILE,), jnp.float32),
            "x_smem": plgpu.SMEM((TILE, TILE), jnp.float32, transforms=swizzled(TILE, jnp.float32)),
            "values_smem": plgpu.SMEM((TILE, TILE), E4M3, transforms=swizzled(TILE, E4M3)),
            "out_scales_smem": plgpu.SMEM((TILE,), jnp.float32),
            "arrived": plgpu.Barrier(num_arrivals=2),
        },
        interpret,
    )(values, scales)
    return Quantized(out_values[:, :m], out_scales[:, :k].T, "1x128")


def _quantize_tiles(x, power_of_two, interpret, *, rows: bool, columns: bool) -> list[Quantized]:
    """Along the rows, or along the columns (transposed), or both in this order."""
    m, k = x.shape
    padded = pad_last(x, 16)
    out_types, outs = [], []
    if rows:
        out_types += [jax.ShapeDtypeStruct(padded.shape, E4M3), _scales_struct(k, m)]
    if columns:
        out_types += [jax.ShapeDtypeStruct((k, m + -m % 16), E4M3), _scales_struct(m, k)]
    kernel = functools.partial(_tiles_kernel, power_of_two=power_of_two)
    out_smem = (
        plgpu.SMEM((TILE, TILE), E4M3, transforms=swizzled(TILE, E4M3)),
        plgpu.SMEM((TILE,), jnp.float32),
    )
    scratch: dict[str, Any] = {
        "x_smem": plgpu.SMEM((TILE, TILE), x.dtype, transforms=swizzled(TILE, x.dtype)),
        "rows_smem": out_smem if rows else None,
        "columns_smem": out_smem if columns else None,
        "arrived": plgpu.Barrier(),
    }
    name = "quantize_" + "_and_".join(["rows"] * rows + ["columns"] * columns)
    results = _launch(kernel, name, (m, k), out_types, scratch, interpret)(padded)
    if rows:
        outs.append(Quantized(results[0][:, :k], results[1][:, :m].T, "1x128"))
    if columns:
        outs.append(Quantized(results[-2][:, :m], results[-1][:, :k].T, "1x128"))
    return outs


def _quantize_blocks(x, power_of_two, interpret) -> Quantized:
    m, k = x.shape
    padded = pad_last(x, 16)
    values, scales = _launch(
        functools.partial(_blocks_kernel, power_of_two=power_of_two),
        "quantize_blocks",
        (m, k),
        [
            jax.ShapeDtypeStruct(padded.shape, E4M3),
            jax.ShapeDtypeStruct((pl.cdiv(m, TILE), pl.cdiv(k, TILE)), jnp.float32),
        ],
        {
            "x_smem": plgpu.SMEM((TILE, TILE), x.dtype, transforms=swizzled(TILE, x.dtype)),
            "values_smem": plgpu.SMEM((TILE, TILE), E4M3, transforms=swizzled(TILE, E4M3)),
            "scale_smem": plgpu.SMEM((HALF,), jnp.float32),
            "arrived": plgpu.Barrier(),
        },
        interpret,
    )(padded)
    return Quantized(values[:, :k], scales, "128x128")


def _scales_struct(contraction: int, others: int) -> jax.ShapeDtypeStruct:
    """Scales [tiles along the contraction, others]; TMA wants rows of a multiple of 16 bytes."""
    return jax.ShapeDtypeStruct((pl.cdiv(contraction, TILE), others + -others % 4), jnp.float32)


def _launch(kernel, name: str, shape: tuple[int, int], out_types, scratch: dict[str, Any], interpret):
    """`kernel`, told its grid of tiles, one warpgroup a block, as many blocks as find room and each with many tiles."""
    tiles = pl.cdiv(shape[0], TILE), pl.cdiv(shape[1], TILE)
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
    """`outs`: values and scales along the rows, then along the columns, of which either may be missing."""

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
                _quantize_rows(part, rows_smem[0].at[half], rows_smem[1].at[half], power_of_two)
            if columns_smem is not None:
                transposed = x_smem.at[:, half].transpose((1, 0))
                part = plgpu.load(transposed, layout=plgpu.Layout.WGMMA, optimized=False)
                _quantize_rows(part, columns_smem[0].at[half], columns_smem[1].at[half], power_of_two)
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
    x_smem,
    values_smem,
    out_scales_smem,
    arrived,
    tiles,
    power_of_two,
):
    @plgpu.nd_loop(tiles, collective_axes="blocks")
    def _(loop):
        i, j = loop.index
        along_m, along_k = pl.ds(i * TILE, TILE), pl.ds(j * TILE, TILE)
        plgpu.copy_gmem_to_smem(q.at[along_m, along_k], q_smem, arrived)
        plgpu.copy_gmem_to_smem(scales.at[j, along_m], scales_smem, arrived)
        plgpu.barrier_wait(arrived)
        for start in (0, HALF):
            half = pl.ds(start, HALF)
            values = plgpu.load(q_smem.at[half], layout=plgpu.Layout.WGMMA).astype(jnp.float32)
            row_scales = plgpu.load(scales_smem.at[half], layout=plgpu.Layout.WGMMA.reduce(1))
            x_smem[half] = values * lax.broadcast_in_dim(row_scales, values.shape, (0,))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.commit_smem()
        for start in (0, HALF):
            half = pl.ds(start, HALF)
            part = plgpu.load(x_smem.at[:, half].transpose((1, 0)), layout=plgpu.Layout.WGMMA, optimized=False)
            _quantize_rows(part, values_smem.at[half], out_scales_smem.at[half], power_of_two)
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
        # As a vector, since Mosaic reinterprets the bits of no scalar; read back from shared memory to store one.
        scale = scales_from_magnitude(lax.broadcast_in_dim(jnp.max(largest), (HALF,), ()), power_of_two)
        scale_smem[...] = scale
        for start in (0, HALF):
            values_smem[pl.ds(start, HALF)] = values_from_scaled(_scale_rows(half(start), scale))
        plgpu.commit_smem()
        scales[i, j] = scale_smem[0]
        plgpu.copy_smem_to_gmem(values_smem, values.at[tile])

    plgpu.wait_smem_to_gmem(0)


def _quantize_rows(x: Float[Array, "64 128"], values_smem, scales_smem, power_of_two: bool) -> None:
    x = x.astype(jnp.float32)
    scales = scales_from_magnitude(jnp.max(magnitude_bits(x), axis=1), power_of_two)
    values_smem[...] = values_from_scaled(_scale_rows(x, scales))
    scales_smem[...] = scales


def _scale_rows(x: Float[Array, "64 128"], scales: Float[Array, " 64"]) -> Float[Array, "64 128"]:
    return x * lax.broadcast_in_dim(1 / scales, x.shape, (0,))
