"""RMSNorm with the quantization behind it on Hopper, in Mosaic GPU.

Forward, a block has a tile, as in `quantize/hopper.py`: the rows' statistics are an operand. Where the normed rows are
wanted too, they replace the tile in shared memory. Backward, a block has whole rows in shared memory, so that the mean
of a row and the gradient that needs it take one read. Rows are one after the other over all lanes: each lane adds up
the gradient of its own columns of the weight in registers, over all rows of its block. XLA adds the blocks up.
"""

from __future__ import annotations

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.device import once_a_program
from pallas_kernels.hopper_launch import SHARED_MEMORY_BYTES, multiprocessors, pad_to
from pallas_kernels.quantize.hopper import HALF, cut, launch, quantize_rows, scales_struct, tile_smem
from pallas_kernels.quantize.quantized import E4M3, TILE, Quantized
from pallas_kernels.rms_norm import reference

_BY_ROW, _BY_COLUMN = plgpu.Layout.WGMMA_8BIT.reduce(1), plgpu.Layout.WGMMA_8BIT.reduce(0)
_WARPS = 4
_STEP_BYTES = 16_384  # of the rows that a block of the gradient has at a time, unless one row is longer
_MOST_TILES = 64  # of 128 columns whose sums the registers hold
_MAX_BLOCKS = 2  # blocks of the gradient per multiprocessor: as many as its registers allow with V3's hidden size

Interpret = plgpu.InterpretGPUParams | None


@once_a_program("power_of_two_scales", "with_rows")
def quantize_scaled(
    x: Float[Array, "M d"], reciprocal: Float[Array, " M"], weight: Float[Array, " d"],
    power_of_two_scales: bool, with_rows: bool, *, interpret: Interpret = None,
) -> tuple[Quantized, Float[Array, "M d"] | None]:  # fmt: skip
    """Computes `reference.quantize_scaled`."""
    m, x = x.shape[0], pad_to(x, 8, 1)
    rows, width = x.shape
    values, scales, *normed = launch(
        functools.partial(_forward_kernel, power_of_two=power_of_two_scales),
        "quantize_rms_norm",
        (rows, width),
        [
            jax.ShapeDtypeStruct((rows, width), E4M3),
            scales_struct(width, rows),
            *[jax.ShapeDtypeStruct((rows, width), x.dtype)] * with_rows,
        ],
        {
            "x_smem": tile_smem(x.dtype, width),
            "reciprocal_smem": plgpu.SMEM((TILE,), jnp.float32),
            "weight_smem": plgpu.SMEM((TILE,), jnp.float32),
            "values_smem": tile_smem(E4M3, width),
            "scales_smem": plgpu.SMEM((TILE,), jnp.float32),
            "arrived": plgpu.Barrier(num_arrivals=3),
        },
        interpret,
    )(x, pad_to(reciprocal, TILE), weight)
    tiles = Quantized(cut(values, m, width), cut(scales, width // TILE, m).T, "1x128")
    return tiles, cut(normed[0], m, width) if with_rows else None


@once_a_program()
def rms_norm_gradient(
    x: Float[Array, "M d"], reciprocal: Float[Array, " M"], weight: Float[Array, " d"],
    gradient: Float[Array, "M d"], plus: Float[Array, "M d"] | None, *, interpret: Interpret = None,
) -> tuple[Float[Array, "M d"], Float[Array, " d"]]:  # fmt: skip
    """Computes `reference.rms_norm_gradient`.

    Columns of zeros are added to widths that four warps cannot share. Rows too wide for the registers are XLA's.
    """
    (m, d), wide = x.shape, _WARPS * TILE
    if d > _MOST_TILES * TILE:
        return reference.rms_norm_gradient(x, reciprocal, weight, gradient, plus)

    def in_tiles(operand: Array) -> Array:
        return pad_to(operand, wide).reshape(*operand.shape[:-1], -1, TILE)

    by_row = [in_tiles(operand) for operand in (x, gradient, plus) if operand is not None]
    x, weight = by_row[0], in_tiles(weight)
    tiles = x.shape[1]
    rows = max(1, _STEP_BYTES // (tiles * TILE * x.dtype.itemsize))
    used = tiles * TILE * (rows * sum(operand.dtype.itemsize for operand in by_row) + 4)
    together = min(SHARED_MEMORY_BYTES // (used + 3072), _MAX_BLOCKS)
    blocks = min(pl.cdiv(m, rows), multiprocessors() * together)
    bars, sums = plgpu.kernel(
        functools.partial(_gradient_kernel, steps=pl.cdiv(m, rows), width=d),
        out_type=[
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((blocks, tiles, TILE), jnp.float32),
        ],
        scratch_types={
            "by_row_smem": [plgpu.SMEM((rows, tiles, TILE), operand.dtype) for operand in by_row],
            "weight_smem": plgpu.SMEM((tiles, TILE), jnp.float32),
            "weight_arrived": plgpu.Barrier(),
            "arrived": plgpu.Barrier(num_arrivals=len(by_row)),
        },
        grid=(blocks,),
        grid_names=("blocks",),
        kernel_name="rms_norm_gradient",
        interpret=interpret,
    )(weight, pad_to(reciprocal, rows), *by_row)
    return cut(bars.reshape(m, -1), m, d), jnp.sum(sums, axis=0).reshape(-1)[:d]


def _forward_kernel(
    x, reciprocal, weight, values, scales, *normed,
    x_smem, reciprocal_smem, weight_smem, values_smem, scales_smem, arrived, tiles, power_of_two,
):  # fmt: skip
    @plgpu.nd_loop(tiles, collective_axes="blocks")
    def _(loop):
        i, j = loop.index
        rows, columns = pl.ds(i * TILE, TILE), pl.ds(j * TILE, TILE)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.copy_gmem_to_smem(x.at[rows, columns], x_smem, arrived)
        plgpu.copy_gmem_to_smem(reciprocal.at[rows], reciprocal_smem, arrived)
        plgpu.copy_gmem_to_smem(weight.at[columns], weight_smem, arrived)
        plgpu.barrier_wait(arrived)
        gains = plgpu.load(weight_smem, layout=_BY_COLUMN)
        for start in (0, HALF):
            half = pl.ds(start, HALF)
            part = plgpu.load(x_smem.at[half], layout=plgpu.Layout.WGMMA_8BIT).astype(jnp.float32)
            by_row = plgpu.load(reciprocal_smem.at[half], layout=_BY_ROW)
            part = part * lax.broadcast_in_dim(by_row, part.shape, (0,))
            part = (part * lax.broadcast_in_dim(gains, part.shape, (1,))).astype(x.dtype)
            if normed:
                x_smem[half] = part
            quantize_rows(part, values_smem.at[half], scales_smem.at[half], power_of_two)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(values_smem, values.at[rows, columns])
        plgpu.copy_smem_to_gmem(scales_smem, scales.at[j, rows])
        if normed:
            plgpu.copy_smem_to_gmem(x_smem, normed[0].at[rows, columns])

    plgpu.wait_smem_to_gmem(0)


def _gradient_kernel(
    weight, reciprocal, *refs, by_row_smem, weight_smem, weight_arrived, arrived, steps, width
):  # fmt: skip
    *by_row, bars, sums = refs
    x_smem, gradient_smem, *plus_smem = by_row_smem
    rows, tiles, _ = x_smem.shape
    # A warp has a tile of 128 columns, a lane four neighbours of them: 16 bytes of float32, the most that a load takes.
    tiling = plgpu.Tiling(((_WARPS, TILE), (4,)))
    layout = plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
    parts = [pl.ds(start, _WARPS) for start in range(0, tiles, _WARPS)]

    def load(ref):
        return plgpu.load(ref, layout=layout).astype(jnp.float32)

    plgpu.copy_gmem_to_smem(weight, weight_smem, weight_arrived)
    plgpu.barrier_wait(weight_arrived)

    @plgpu.nd_loop(
        (steps,),
        collective_axes="blocks",
        init_carry=tuple(plgpu.layout_cast(jnp.zeros((_WARPS, TILE), jnp.float32), layout) for _ in parts),
    )
    def totals(loop, carry):
        (step,) = loop.index
        own = pl.ds(step * rows, rows)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for source, target in zip(by_row, by_row_smem, strict=True):
            plgpu.copy_gmem_to_smem(source.at[own], target, arrived)
        plgpu.barrier_wait(arrived)

        def one_row(row, carry):
            products = [
                load(x_smem.at[row, p]) * load(gradient_smem.at[row, p]) * load(weight_smem.at[p]) for p in parts
            ]
            total = jnp.sum(jnp.sum(functools.reduce(jnp.add, products), axis=1), axis=0)
            by = reciprocal[step * rows + row]
            mean = total * by * (1 / width)
            added = []
            for p, before in zip(parts, carry, strict=True):
                scaled, bar = load(x_smem.at[row, p]) * by, load(gradient_smem.at[row, p])
                added.append(before + bar * scaled)
                x_bar = by * (bar * load(weight_smem.at[p]) - scaled * mean)
                for other in plus_smem:
                    x_bar = x_bar + load(other.at[row, p])
                x_smem[row, p] = x_bar.astype(x_smem.dtype)
            return tuple(added)

        carry = lax.fori_loop(0, rows, one_row, carry)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(x_smem, bars.at[own])
        return carry

    for p, total in zip(parts, totals, strict=True):
        weight_smem[p] = total
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(weight_smem, sums.at[lax.axis_index("blocks")])
    plgpu.wait_smem_to_gmem(0)
