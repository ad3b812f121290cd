"""The FP8 product on Hopper, in Mosaic GPU: TMA, wgmma on e4m3, warp specialisation, a persistent grid.

Each multiprocessor runs one block of three warpgroups. The producer visits the block's tiles and, 128 of K at a time,
has TMA copy a tile of A with its scales and one of B (for a weight gradient with its scales too) into a ring of
shared-memory stages. The two consumers, with 64 rows of the tile each (or 128 in two waves), multiply what arrives
with four wgmma (128 = 4 x 32 of K). Then they add the partial sum times both scales to totals in float32 registers: the
tensor core's own accumulator has about 14 bits and never sums more than 128 products (report, section 3.3.2). While one
consumer promotes, the other's wgmma keep the tensor cores busy. Few rows have a tile of 64 and a single consumer.
`pallas_kernels/README.md` has a picture and the reasons.

Edges cost nothing: TMA reads zeros outside of an array and drops what would be written there.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.blockwise_matmul.tuning import WARPGROUP_ROWS, Tiling, choose_tiling
from pallas_kernels.device import once_a_program
from pallas_kernels.hopper_launch import multiprocessors, pad_to, swizzled
from pallas_kernels.quantize.quantized import E4M3, PROMOTION_INTERVAL, TILE, Quantized

PRODUCER_REGISTERS = 40
CONSUMER_REGISTERS = 232

_ALIKE = 32  # bytes of the narrowest swizzle, which a row of the result must be a multiple of
_ROWS = plgpu.Layout.WGMMA.reduce(1)
_COLUMNS = plgpu.Layout.WGMMA.reduce(0)


@once_a_program("out_dtype", "tiling")
def matmul(
    a: Quantized,
    b: Quantized,
    accumulator: Float[Array, "M N"] | None,
    out_dtype: DTypeLike,
    *,
    tiling: Tiling | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Float[Array, "M N"]:
    """Returns A·Bᵀ (+ accumulator); operands as in `blockwise_matmul`.

    TMA moves whole swizzled tiles. So operands are padded by a copy unless M is a multiple of 8, N one of 8 (of 16 for
    a bfloat16 result) and K one of 32, and the padding of the product is cut off.
    """
    (m, k), n = a.shape, b.shape[0]
    if accumulator is not None and out_dtype != jnp.float32:
        return matmul(a, b, accumulator, jnp.float32, tiling=tiling, interpret=interpret).astype(out_dtype)
    out_dtype = jnp.dtype(out_dtype)
    by_column = b.tile == "1x128"
    tiling = tiling or choose_tiling(m, n, k, out_dtype.itemsize, by_column, multiprocessors())
    kernel_dtype = out_dtype if tiling.splits == 1 else jnp.dtype(jnp.float32)
    if not tiling.fits(kernel_dtype.itemsize):
        raise ValueError(f"{tiling} does not fit into shared memory with {kernel_dtype} out")
    operands = [
        pad_to(a.values, 8, 32),
        pad_to(a.scales.T, 4),
        pad_to(b.values, _ALIKE // kernel_dtype.itemsize, 32),
        pad_to(b.scales.T, 4) if by_column else b.scales,
    ]
    if accumulator is not None and tiling.splits == 1:
        operands.append(pad_to(accumulator, 8, 8))
    shape = (operands[0].shape[0], operands[2].shape[0])
    out = _launch(operands, shape, kernel_dtype, by_column, tiling, interpret)
    out = out if shape == (m, n) else out[..., :m, :n]
    if tiling.splits == 1:
        return out
    return (out.sum(0) if accumulator is None else out.sum(0) + accumulator).astype(out_dtype)


class _Tile(NamedTuple):
    """A tile of one block: where it starts, which part of K it sums, and how many steps the block made before it."""

    row: Array | int
    column: Array | int
    split: Array | int
    first_k: Array | int
    steps_before: Array | int


def _launch(operands, shape, out_dtype, by_column, tiling, interpret):
    stages, tile_m, tile_n, cluster = tiling.stages, tiling.tile_m, tiling.tile_n, tiling.cluster
    has_accumulator, depth = len(operands) == 5, operands[0].shape[1]
    freed = {"num_arrivals": tiling.consumers, "num_barriers": stages}
    transforms = swizzled(PROMOTION_INTERVAL, E4M3, depth)
    scratch: dict[str, Any] = {
        "a_smem": plgpu.SMEM((stages, tile_m, PROMOTION_INTERVAL), E4M3, transforms=transforms),
        "b_smem": plgpu.SMEM((stages, tile_n, PROMOTION_INTERVAL), E4M3, transforms=transforms),
        "a_scales_smem": plgpu.SMEM((stages, tile_m), jnp.float32),
        # TMA writes to addresses that are multiples of 128 bytes: each stage has that many.
        "b_scales_smem": plgpu.SMEM((stages, tile_n + -tile_n % 32), jnp.float32) if by_column else None,
        "out_smem": plgpu.SMEM(
            (tiling.consumers, tile_n // tiling.scale_columns, WARPGROUP_ROWS, tiling.scale_columns),
            out_dtype,
            transforms=swizzled(tiling.scale_columns, out_dtype, shape[1]),
        ),
        "filled": plgpu.Barrier(num_arrivals=3 + by_column, num_barriers=stages),
        "freed": plgpu.ClusterBarrier(collective_axes=("cluster",), **freed) if cluster > 1 else plgpu.Barrier(**freed),
        "accumulator_filled": plgpu.Barrier(num_barriers=tiling.consumers) if has_accumulator else None,
    }
    kernel = plgpu.kernel(
        functools.partial(_kernel, tiling=tiling, by_column=by_column, has_accumulator=has_accumulator),
        out_type=jax.ShapeDtypeStruct(shape if tiling.splits == 1 else (tiling.splits, *shape), out_dtype),
        scratch_types=scratch,
        grid=(multiprocessors() // cluster,),
        grid_names=("blocks",),
        cluster=(cluster,),
        cluster_names=("cluster",),
        num_threads=tiling.consumers + 1,
        thread_name="warpgroup",
        kernel_name="blockwise_matmul",
        interpret=interpret,
    )
    return kernel(*operands)


def _kernel(*refs, tiling: Tiling, by_column: bool, has_accumulator: bool, **scratch):
    """The program of one block. `refs` are a, its scales, b, its scales, (accumulator,) out, all in global memory."""
    accumulator = refs[4] if has_accumulator else None
    a, a_scales, b, b_scales, out = *refs[:4], refs[-1]
    # Of each tile. The last of several parts of K may end past it, where TMA reads zeros.
    k_steps = pl.cdiv(pl.cdiv(a.shape[1], PROMOTION_INTERVAL), tiling.splits)
    m_tiles = pl.cdiv(out.shape[-2], tiling.tile_m * tiling.cluster_m)
    n_tiles = pl.cdiv(out.shape[-1], tiling.tile_n * tiling.cluster_n)
    tiles = m_tiles * n_tiles * tiling.splits
    warpgroup, cluster_rank = lax.axis_index("warpgroup"), lax.axis_index("cluster")
    row_rank, column_rank = (cluster_rank, 0) if tiling.shared == "b" else (0, cluster_rank)

    def for_each_tile(body):
        """Calls `body` for every tile of this block; returns the number of steps of all of them."""

        @plgpu.nd_loop((tiles,), collective_axes="blocks")
        def _(loop):
            index, split = loop.index[0], 0
            if tiling.splits > 1:
                split, index = lax.div(index, m_tiles * n_tiles), lax.rem(index, m_tiles * n_tiles)
            m, n = plgpu.planar_snake(index, (m_tiles, n_tiles), 1, tiling.raster_width)
            row = (m * tiling.cluster_m + row_rank) * tiling.tile_m
            column = (n * tiling.cluster_n + column_rank) * tiling.tile_n
            body(_Tile(row, column, split, split * k_steps, loop.local_index * k_steps))

        blocks = lax.axis_size("blocks")
        return lax.div(tiles - lax.axis_index("blocks") + blocks - 1, blocks) * k_steps

    # With one consumer, every thread can have as many registers as an instruction can name.
    adjust_registers = tiling.consumers > 1

    @pl.when(warpgroup == tiling.consumers)
    def _():
        if adjust_registers:
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        _produce(for_each_tile, k_steps, a, a_scales, b, b_scales if by_column else None, tiling, **scratch)

    @pl.when(warpgroup != tiling.consumers)
    def _():
        if adjust_registers:
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
        block_scales = None if by_column else b_scales
        _consume(for_each_tile, k_steps, warpgroup, block_scales, accumulator, out, tiling, **scratch)


def _produce(
    for_each_tile, k_steps, a, a_scales, b, b_scales, tiling,
    *, a_smem, a_scales_smem, b_smem, b_scales_smem, filled, freed, **_,
):  # fmt: skip
    """Keeps the ring full: waits until the consumers have finished with a stage, then has TMA fill it again."""
    a_blocks, b_blocks = ("cluster" if size > 1 else None for size in (tiling.cluster_n, tiling.cluster_m))

    def fill_stages(tile: _Tile):
        rows, columns = pl.ds(tile.row, tiling.tile_m), pl.ds(tile.column, tiling.tile_n)

        @pl.loop(0, k_steps)
        def _(k):
            step = tile.steps_before + k
            stage = lax.rem(step, tiling.stages)

            @pl.when(step >= tiling.stages)
            def _():
                plgpu.barrier_wait(freed.at[stage])
                plgpu.commit_smem()  # orders the consumers' reads of the scales before TMA's next write

            k += tile.first_k
            depth, arrived = pl.ds(k * PROMOTION_INTERVAL, PROMOTION_INTERVAL), filled.at[stage]
            copies = [
                (a.at[rows, depth], a_smem.at[stage], a_blocks),
                (b.at[columns, depth], b_smem.at[stage], b_blocks),
                (a_scales.at[k, rows], a_scales_smem.at[stage], a_blocks),
            ]
            if b_scales is not None:
                # Not shared by a cluster: half of them need not start at a multiple of 128 bytes.
                target = b_scales_smem.at[stage, pl.ds(0, tiling.tile_n)]
                copies.append((b_scales.at[k, columns], target, None))
            for source, target, blocks in copies:
                plgpu.copy_gmem_to_smem(source, target, arrived, collective_axes=blocks)

    steps = for_each_tile(fill_stages)

    # A block must not end while the other block of its cluster may still write to it or signal it.
    @pl.loop(jnp.maximum(steps - tiling.stages, 0), steps)
    def _(step):
        plgpu.barrier_wait(freed.at[lax.rem(step, tiling.stages)])


def _consume(
    for_each_tile, k_steps, warpgroup, b_scales, accumulator, out, tiling,
    *, a_smem, a_scales_smem, b_smem, b_scales_smem, out_smem, filled, freed, accumulator_filled,
):  # fmt: skip
    """Multiplies what arrives, promotes the partial sums, writes the tile."""
    width = tiling.scale_columns
    parts, waves = range(tiling.tile_n // width), range(tiling.waves)
    first_row = warpgroup * tiling.waves * WARPGROUP_ROWS

    def scales_of_blocks(column, k):
        """Returns the scale of B's block for each part of the tile, none where B has a scale per column.

        Past the edges of the matrices the scales do not matter, since the values there are zeros.
        """
        if b_scales is None:
            return ()
        last_block, last_k = (size - 1 for size in b_scales.shape)
        blocks = (jnp.minimum(lax.div(column + part * width, TILE), last_block) for part in parts)
        return tuple(b_scales[block, jnp.minimum(k, last_k)] for block in blocks)

    def scales_of_columns(stage):
        if b_scales_smem is None:
            return ()
        return tuple(plgpu.load(b_scales_smem.at[stage, pl.ds(part * width, width)], layout=_COLUMNS) for part in parts)

    def compute_tile(tile: _Tile):
        row, column = tile.row + first_row, tile.column

        def accumulate(k, carry):
            totals, block_scales = carry
            stage = lax.rem(tile.steps_before + k, tiling.stages)
            plgpu.barrier_wait(filled.at[stage])

            def one_wave(wave, before):
                """Returns the totals of 64 rows with this step's products; in the first wave the next step's scales."""
                rows = pl.ds(first_row + wave * WARPGROUP_ROWS, WARPGROUP_ROWS)

                def multiply(acc):
                    plgpu.wgmma(acc, a_smem.at[stage, rows], b_smem.at[stage].transpose((1, 0)))
                    # While the tensor cores work: this step's scales from the ring, the next one's of the blocks.
                    row_scales = plgpu.load(a_scales_smem.at[stage, rows], layout=_ROWS)
                    columns = scales_of_columns(stage)  # before acc is read, which waits for the products
                    upcoming = scales_of_blocks(column, tile.first_k + k + 1) if wave == 0 else ()
                    return acc[...], row_scales, columns, upcoming

                partial, row_scales, column_scales, upcoming = pl.run_scoped(
                    multiply, plgpu.WGMMAAccumulatorRef((WARPGROUP_ROWS, tiling.tile_n), jnp.float32)
                )
                if wave == waves[-1]:
                    plgpu.barrier_arrive(freed.at[stage])
                promoted = []
                for part in parts:
                    dots = partial[:, part * width : (part + 1) * width]
                    if b_scales is None:
                        scale = _over_columns(row_scales, dots.shape) * _over_rows(column_scales[part], dots.shape)
                    else:
                        scale = _over_columns(row_scales * block_scales[part], dots.shape)
                    promoted.append(before[part] + dots * scale)
                return tuple(promoted), upcoming

            first, second = totals[: len(parts)], totals[len(parts) :]
            first, upcoming = one_wave(0, first)
            if second:

                def skip():
                    plgpu.barrier_arrive(freed.at[stage])
                    return second

                # The compilers would start the second wave's products before the first one's are promoted, for which
                # there are not enough registers: LLVM without this barrier, ptxas without a branch.
                first = lax.optimization_barrier(first)
                inside = row + WARPGROUP_ROWS < out.shape[-2]
                second = lax.cond(inside, lambda: one_wave(1, second)[0], skip)
            return (*first, *second), upcoming

        zeros = tuple(
            plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, width), jnp.float32), plgpu.Layout.WGMMA)
            for _ in range(len(waves) * len(parts))
        )
        totals, _ = lax.fori_loop(0, k_steps, accumulate, (zeros, scales_of_blocks(column, tile.first_k)))
        target = out if tiling.splits == 1 else out.at[tile.split]
        for wave in waves:
            of_wave = totals[wave * len(parts) : (wave + 1) * len(parts)]
            write_wave(target, row + wave * WARPGROUP_ROWS, column, of_wave)

    def write_wave(target, row, column, totals):
        rows = pl.ds(row, WARPGROUP_ROWS)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for part in parts:
            columns = pl.ds(column + part * width, width)
            tile = out_smem.at[warpgroup, part]
            if accumulator is not None:
                plgpu.copy_gmem_to_smem(accumulator.at[rows, columns], tile, accumulator_filled.at[warpgroup])
                plgpu.barrier_wait(accumulator_filled.at[warpgroup])
                tile[...] += totals[part]
            else:
                tile[...] = totals[part].astype(out.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(tile, target.at[rows, columns])

    for_each_tile(compute_tile)
    plgpu.wait_smem_to_gmem(0)


def _over_columns(rows: Float[Array, " M"], shape: tuple[int, int]) -> Float[Array, "M N"]:
    return lax.broadcast_in_dim(rows, shape, (0,))


def _over_rows(columns: Float[Array, " N"], shape: tuple[int, int]) -> Float[Array, "M N"]:
    return lax.broadcast_in_dim(columns, shape, (1,))
