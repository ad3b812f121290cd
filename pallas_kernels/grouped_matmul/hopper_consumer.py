"""The consumers of a grouped product on Hopper, which multiply the stages of the ring and write the tiles."""

from __future__ import annotations

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.blockwise_matmul.tuning import WARPGROUP_ROWS
from pallas_kernels.grouped_matmul.hopper_form import Form, Tile
from pallas_kernels.grouped_matmul.tiling import PART, Tiling
from pallas_kernels.quantize.quantized import TILE

_ROWS = plgpu.Layout.WGMMA.reduce(1)
_COLUMNS = plgpu.Layout.WGMMA.reduce(0)


def consume(
    for_each_tile, warpgroup, scales, accumulator, out, form: Form, tiling: Tiling,
    *, a_smem, b_smem, b_scales_smem, out_smem, filled, freed, accumulator_filled,
):  # fmt: skip
    """Multiplies the stages as they arrive and writes the tiles."""
    parts = range(tiling.tile_n // PART)

    def multiply(acc, stage):
        a, b = a_smem.at[stage, warpgroup], b_smem.at[stage]
        plgpu.wgmma(acc, _transposed(a) if form.a_row_major else a, b if form.row_major else _transposed(b))

    def product_in_accumulator(tile: Tile, steps_before):
        """Multiplies bfloat16. A stage is free when its products are done, while those of the next step run."""

        def contract(acc):
            @pl.loop(0, tile.steps)
            def _(k):
                step = steps_before + k
                plgpu.barrier_wait(filled.at[lax.rem(step, tiling.stages)])
                multiply(acc, lax.rem(step, tiling.stages))
                plgpu.wgmma_wait(1)

                @pl.when(k > 0)
                def _():
                    plgpu.barrier_arrive(freed.at[lax.rem(step - 1, tiling.stages)])

            return acc[...]

        total = pl.run_scoped(contract, plgpu.WGMMAAccumulatorRef((WARPGROUP_ROWS, tiling.tile_n), jnp.float32))

        @pl.when(tile.steps > 0)
        def _():
            plgpu.barrier_arrive(freed.at[lax.rem(steps_before + tile.steps - 1, tiling.stages)])

        return tuple(total[:, part * PART : (part + 1) * PART] for part in parts)

    def product_promoted(tile: Tile, steps_before):
        """Multiplies FP8: each step's sums leave the accumulator and are scaled and added up in registers."""
        row = tile.row + warpgroup * WARPGROUP_ROWS

        def scales_from_global(k):
            k = tile.first_step + jnp.maximum(jnp.minimum(k, tile.steps - 1), 0)
            k = jnp.minimum(k, scales[0].shape[0] - 1)  # for an empty group at the end
            rows = plgpu.load(scales[0].at[k, pl.ds(row, WARPGROUP_ROWS)], layout=_ROWS, optimized=False)
            if b_scales_smem is not None:
                return rows, ()
            last = scales[1].shape[1] - 1
            blocks = (jnp.minimum(lax.div(tile.column + part * PART, TILE), last) for part in parts)
            return rows, tuple(scales[1][tile.group, block, k] for block in blocks)

        def columns_from_shared(stage):
            """Returns the scales of the right operand's rows from the ring, none where it has a scale per block."""
            if b_scales_smem is None:
                return ()
            return tuple(
                plgpu.load(b_scales_smem.at[stage, pl.ds(part * PART, PART)], layout=_COLUMNS) for part in parts
            )

        def accumulate(k, carry):
            totals, (row_scales, block_scales) = carry
            stage = lax.rem(steps_before + k, tiling.stages)
            plgpu.barrier_wait(filled.at[stage])

            def one_step(acc):
                multiply(acc, stage)
                # While the tensor cores work: the columns' scales of this step, the others of the next.
                columns, upcoming = columns_from_shared(stage), scales_from_global(k + 1)
                return acc[...], columns, upcoming

            partial, column_scales, upcoming = pl.run_scoped(
                one_step, plgpu.WGMMAAccumulatorRef((WARPGROUP_ROWS, tiling.tile_n), jnp.float32)
            )
            plgpu.barrier_arrive(freed.at[stage])
            promoted = []
            for part in parts:
                dots = partial[:, part * PART : (part + 1) * PART]
                if b_scales_smem is not None:
                    scale = lax.broadcast_in_dim(row_scales, dots.shape, (0,)) * lax.broadcast_in_dim(
                        column_scales[part], dots.shape, (1,)
                    )
                else:
                    scale = lax.broadcast_in_dim(row_scales * block_scales[part], dots.shape, (0,))
                promoted.append(totals[part] + dots * scale)
            return tuple(promoted), upcoming

        zeros = tuple(
            plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, PART), jnp.float32), plgpu.Layout.WGMMA) for _ in parts
        )
        totals, _ = lax.fori_loop(0, tile.steps, accumulate, (zeros, scales_from_global(0)))
        return totals

    def compute_tile(tile: Tile, steps_before):
        totals = (product_promoted if form.fp8 else product_in_accumulator)(tile, steps_before)
        row = tile.row + warpgroup * WARPGROUP_ROWS
        within_group = out.at[tile.group] if form.groups == "depth" else out
        for part in parts:
            total = totals[part]
            if form.masked:
                index = plgpu.broadcasted_iota(jnp.int32, total.shape, 0, layout=plgpu.Layout.WGMMA)
                total = jnp.where(index + warpgroup * WARPGROUP_ROWS < tile.rows_present, total, 0.0)
            buffer = out_smem.at[warpgroup, part % tiling.slots]
            plgpu.wait_smem_to_gmem(tiling.slots - 1, wait_read_only=True)
            place = pl.ds(row, WARPGROUP_ROWS), pl.ds(tile.column + part * PART, PART)
            if form.accumulates:
                plgpu.copy_gmem_to_smem(accumulator.at[tile.group].at[place], buffer, accumulator_filled.at[warpgroup])
                plgpu.barrier_wait(accumulator_filled.at[warpgroup])
                buffer[...] += total
            else:
                buffer[...] = total.astype(out.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(buffer, within_group.at[place])

    for_each_tile(compute_tile)
    plgpu.wait_smem_to_gmem(0)


def _transposed(ref):
    return ref.transpose((1, 0))
