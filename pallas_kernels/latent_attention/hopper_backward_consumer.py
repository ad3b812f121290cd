"""The consumers of the backward pass on Hopper, which multiply tiles and add up the gradients of their own rows."""

from __future__ import annotations

import functools
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.latent_attention.hopper_backward_plan import Arrays, Plan, Tile
from pallas_kernels.latent_attention.hopper_form import (
    BY_COLUMN,
    BY_ROW,
    ROWS,
    TILE,
    mask,
    over_columns,
    over_rows,
    transposed,
)


def consume(
    for_each_tile, warpgroup, arrays: Arrays, segments, outputs, plan: Plan,
    *, own_smem, own_value_smem, other_smem, other_value_smem, log_sums_smem, mean_smem,
    own_filled, own_freed, filled, freed,
):  # fmt: skip
    """Computes the gradients of 64 rows of each tile."""
    form = plan.form
    own_parts = [i for i, part in enumerate(form.parts) if not (plan.shares and part.shared)]
    shape = (ROWS, plan.other)

    def statistics(tile: Tile, head, row):
        """Returns a function of a stage that gives what both accumulators start from, broadcast to the tile.

        Sums of logits start from minus the logarithm of the row's sum, divided by the scale, and those of the weights'
        gradients from minus the row's mean: neither takes registers while products run.
        """

        def starts(by_own, broadcast):
            log_sums, mean = by_own
            return broadcast(log_sums * (-1 / form.scale), shape), broadcast(-mean, shape)

        if log_sums_smem is None:
            rows = pl.ds(row, ROWS)
            by_row = [
                plgpu.load(x.at[tile.batch, head, rows], layout=BY_ROW, optimized=False)
                for x in (arrays.log_sums, arrays.mean)
            ]
            return lambda stage: starts(by_row, over_columns)

        def of_stage(stage):
            by_column = [plgpu.load(x.at[stage], layout=BY_COLUMN) for x in (log_sums_smem, mean_smem)]
            plgpu.commit_smem()  # orders these reads before TMA's next write
            return starts(by_column, over_rows)

        return of_stage

    def masked_where_needed(logits, tile: Tile, row, t):
        """Masks the tile unless all of its queries see all of its keys."""
        needed: Any = False
        if form.causal:
            needed = t < TILE // plan.other
        elif plan.side == "queries" and form.length % plan.other:
            needed = t == 0
        ids = None
        if segments is not None:
            own, other = (1, 2) if plan.side == "queries" else (2, 1)
            ids = segments[0].at[tile.batch]
            needed |= segments[own][tile.batch, tile.index] != segments[other][tile.batch, tile.other(plan, t)]
        if needed is False:
            return logits
        column = tile.other(plan, t) * plan.other
        masked = functools.partial(mask, logits, form, row, column, ids, keys_in_rows=plan.side == "keys")
        return lax.cond(needed, masked, lambda: logits)

    def accumulate(tile: Tile, head, row, steps_before, to_parts, to_values):
        """Adds the products of all tiles of the other side to the accumulators."""
        statistics_of = statistics(tile, head, row)

        @pl.loop(0, tile.count)
        def _(t):
            stage = lax.rem(steps_before + t, plan.stages)
            plgpu.barrier_wait(filled.at[stage])

            def products(logits_acc, weights_bar_acc):
                logits_acc[...], weights_bar_acc[...] = statistics_of(stage)
                for own, other in zip(own_smem, other_smem, strict=True):
                    plgpu.wgmma(logits_acc, own.at[warpgroup], transposed(other.at[stage]))
                plgpu.wgmma(weights_bar_acc, own_value_smem.at[warpgroup], transposed(other_value_smem.at[stage]))
                logits = plgpu.wgmma_accumulator_load(logits_acc, wait_n=1)
                weights = jnp.exp2(masked_where_needed(logits, tile, row, t) * form.exponent)
                return weights, weights_bar_acc[...]

            accumulator = plgpu.WGMMAAccumulatorRef(shape, jnp.float32)
            weights, weights_bar = pl.run_scoped(products, accumulator, accumulator)
            logits_bar = (weights * weights_bar).astype(arrays.q.dtype)
            if to_values is not None:
                plgpu.wgmma(to_values, weights.astype(arrays.q.dtype), other_value_smem.at[stage])
            for to_part, other in zip(to_parts, other_smem, strict=True):
                plgpu.wgmma(to_part, logits_bar, other.at[stage])
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(freed.at[stage])

    def write(tile: Tile, head, row, sums):
        """Sends the gradients of one head through the shared memory of the own rows."""
        targets = [own_smem[i] for i in own_parts]
        rows = pl.ds(row, ROWS)
        columns = [
            pl.ds(part.column if plan.side == "queries" else part.key_column, part.width)
            for part in (form.parts[i] for i in own_parts)
        ]
        places = [outputs[0].at[tile.batch, rows, head, column] for column in columns]
        sums = [total * form.scale if i < len(own_parts) else total for i, total in enumerate(sums)]
        if plan.side == "keys":
            targets.append(own_value_smem)
            places.append(outputs[1].at[tile.batch, rows, head])
        for total, target in zip(sums, targets, strict=True):
            target[warpgroup] = total.astype(arrays.q.dtype)
        plgpu.commit_smem()
        for target, place in zip(targets, places, strict=True):
            plgpu.copy_smem_to_gmem(target.at[warpgroup], place)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(own_freed.at[warpgroup])

    def compute_tile(tile: Tile):
        row = tile.index * TILE + warpgroup * ROWS
        widths = [form.parts[i].width for i in own_parts] + [form.value_width] * (plan.side == "keys")

        def all_heads(*to_shared):
            @pl.loop(0, plan.heads)
            def _(i):
                head = tile.group * plan.heads + i

                def one_head(*sums):
                    to_parts = [*sums[: len(own_parts)], *to_shared]
                    to_values = sums[-1] if plan.side == "keys" else None
                    steps_before = tile.steps_before + i * tile.count
                    accumulate(tile, head, row, steps_before, to_parts, to_values)
                    return [total[...] for total in sums]

                plgpu.barrier_wait(own_filled.at[warpgroup])
                sums = pl.run_scoped(one_head, *(plgpu.WGMMAAccumulatorRef((ROWS, w), jnp.float32) for w in widths))
                write(tile, head, row, sums)

            return [total[...] for total in to_shared]

        if plan.shares:
            width = form.parts[-1].width
            (total,) = pl.run_scoped(all_heads, plgpu.WGMMAAccumulatorRef((ROWS, width), jnp.float32))
            outputs[2][tile.group, tile.batch, pl.ds(row, ROWS), :] = total * form.scale
        else:
            all_heads()

    for_each_tile(compute_tile)
    plgpu.wait_smem_to_gmem(0)
