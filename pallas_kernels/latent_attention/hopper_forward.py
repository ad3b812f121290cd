"""The forward pass of training attention on Hopper, in Mosaic GPU: TMA, wgmma, warp specialisation, online softmax.

Each multiprocessor runs one block of three warpgroups. The producer has TMA copy the tile's queries, then tiles of keys
and values into two rings of shared-memory stages. The two consumers have 64 query rows each, and visit the tiles of
keys from the last visible one to the first, so that only the first visited tile needs the causal mask:

    S  = Q K_jᵀ          wgmma from shared memory, 64 x 128 in registers
    O += P_{j+1} V_{j+1} wgmma with P in registers, in flight while the softmax of S is computed
    P  = exp2(S - max)   with the running maximum and sum of each row in registers

While one consumer computes its softmax, its own product of values and the other consumer's products keep the tensor
cores busy. No logits leave the registers. `pallas_kernels/README.md` says more.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.device import once_a_program
from pallas_kernels.hopper_launch import SHARED_MEMORY_BYTES, multiprocessors, pad_to, swizzled
from pallas_kernels.latent_attention.hopper_form import (
    BY_ROW,
    CONSUMER_REGISTERS,
    CONSUMERS,
    LOWEST,
    PRODUCER,
    PRODUCER_REGISTERS,
    ROWS,
    TILE,
    Form,
    Interpret,
    make_form,
    mask,
    over_columns,
    segment_tables,
    transposed,
)
from pallas_kernels.latent_attention.operands import Operands
from pallas_kernels.latent_attention.tiles import key_tiles

STAGES = 2


@once_a_program("scale", "causal")
def forward(
    x: Operands, scale: float, causal: bool, *, interpret: Interpret = None
) -> tuple[Float[Array, "B T H v"], Float[Array, "B H T"]]:
    """Returns the attended values and the natural logarithm of each row's sum of exponentials, in float32.

    TMA moves whole swizzled tiles of 8 rows: other lengths are padded by a copy.
    """
    form = make_form(x, scale, causal)
    batch, length, heads, _ = x.q.shape
    first, end = key_tiles(x.segment_ids, batch, length, TILE, keys_per_tile(form), causal)
    q, k, v = (pad_to(array, 8, 1, 1) for array in (x.q, x.k, x.v))
    operands = [first, end, q, k, v]
    if x.k_shared is not None:
        operands.append(pad_to(x.k_shared, 8, 1))
    operands += segment_tables(x.segment_ids, TILE, keys_per_tile(form))
    rows = -(-length // TILE) * TILE
    out_types = [jax.ShapeDtypeStruct(v.shape, v.dtype), jax.ShapeDtypeStruct((batch, heads, rows), jnp.float32)]
    out, log_sums = plgpu.kernel(
        functools.partial(_kernel, form=form),
        out_type=out_types,
        scratch_types=_scratch(form, v.dtype),
        grid=(multiprocessors(),),
        grid_names=("blocks",),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        kernel_name="latent_attention_forward",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(*operands)
    return out[:, :length], log_sums[:, :, :length]


def keys_per_tile(form: Form) -> int:
    """Returns the number of keys of a tile: 128, or 64 where the rings of wide heads would not fit otherwise."""
    width = sum(part.width for part in form.parts)
    for keys in (128, 64):
        rings = STAGES * keys * (width + form.value_width) * 2
        output = 0 if form.parts[0].width == form.value_width else TILE * form.value_width * 2
        if rings + TILE * width * 2 + output + 4096 <= SHARED_MEMORY_BYTES:
            return keys
    raise ValueError(f"widths {width} of queries and keys and {form.value_width} of values are too wide for Hopper")


def _scratch(form: Form, dtype) -> dict[str, Any]:
    keys = keys_per_tile(form)

    def tiles(*shape: int, alike: int = form.value_width) -> Any:
        return plgpu.SMEM(shape, dtype, transforms=swizzled(shape[-1], dtype, alike))

    return {
        "q_smem": [tiles(CONSUMERS, ROWS, part.width, alike=part.alike) for part in form.parts],
        "k_smem": [tiles(STAGES, keys, part.width, alike=part.alike) for part in form.parts],
        "v_smem": tiles(STAGES, keys, form.value_width),
        # The output of a consumer takes the place of its queries where it has their width.
        "out_smem": None if form.parts[0].width == form.value_width else tiles(CONSUMERS, ROWS, form.value_width),
        "log_sums_smem": plgpu.SMEM((CONSUMERS, ROWS), jnp.float32),
        "q_filled": plgpu.Barrier(num_arrivals=len(form.parts), num_barriers=CONSUMERS),
        "q_freed": plgpu.Barrier(num_barriers=CONSUMERS),
        "k_filled": plgpu.Barrier(num_arrivals=len(form.parts), num_barriers=STAGES),
        "k_freed": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=STAGES),
        "v_filled": plgpu.Barrier(num_barriers=STAGES),
        "v_freed": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=STAGES),
    }


class Tile(NamedTuple):
    """One tile of queries and its range of tiles of keys."""

    batch: Array
    head: Array
    row: Array  # the first query
    end: Array  # the tile of keys after the last one
    count: Array  # of tiles of keys
    steps_before: Array  # in this block


def _kernel(first, end, q, k, v, *refs, form: Form, **scratch):
    """The program of one block. All arguments are in global memory."""
    *optional, out, log_sums = refs
    k_shared = optional.pop(0) if any(part.shared for part in form.parts) else None
    warpgroup = lax.axis_index("warpgroup")
    for_each_tile = functools.partial(_for_each_tile, first=first, end=end, heads=q.shape[2])

    @pl.when(warpgroup == PRODUCER)
    def _():
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        _produce(for_each_tile, q, k, v, k_shared, form, **scratch)

    @pl.when(warpgroup != PRODUCER)
    def _():
        plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
        _consume(for_each_tile, warpgroup, optional, out, log_sums, form, **scratch)


def _for_each_tile(body, *, first, end, heads: int) -> Any:
    """Calls body(tile) for each tile of queries of this block; returns the number of all its steps.

    With the causal mask the i-th tile of queries has i + 1 tiles of keys: a block takes the i-th from the end and the
    i-th from the start together, so that all have the same work. Blocks that run together share heads: their keys and
    values stay in L2.
    """
    batch, tiles = first.shape

    @plgpu.nd_loop((batch, heads, pl.cdiv(tiles, 2)), collective_axes="blocks", init_carry=jnp.int32(0))
    def all_steps(loop, carry):
        row_of_batch, head, pair = loop.index

        def one_tile(member, steps_before):
            index = jnp.where(member == 0, tiles - 1 - pair, pair)
            count = end[row_of_batch, index] - first[row_of_batch, index]
            count = jnp.where((member == 1) & (2 * pair == tiles - 1), 0, count)  # the middle one has no other

            @pl.when(count > 0)
            def _():
                body(Tile(row_of_batch, head, index * TILE, end[row_of_batch, index], count, steps_before))

            return steps_before + count

        return lax.fori_loop(0, 2, one_tile, carry)

    return all_steps


def _produce(
    for_each_tile, q, k, v, k_shared, form: Form,
    *, q_smem, k_smem, v_smem, q_filled, q_freed, k_filled, k_freed, v_filled, v_freed, **_,
):  # fmt: skip
    """Keeps the rings full, and brings each consumer's queries when its previous output has left."""
    keys = keys_per_tile(form)

    def fill(tile: Tile):
        for consumer in range(CONSUMERS):

            @pl.when(tile.steps_before > 0)
            def _(consumer=consumer):
                plgpu.barrier_wait(q_freed.at[consumer])

            rows = pl.ds(tile.row + consumer * ROWS, ROWS)
            for part, part_smem in zip(form.parts, q_smem, strict=True):
                source = part.of_queries(q, tile.batch, rows, tile.head)
                plgpu.copy_gmem_to_smem(source, part_smem.at[consumer], q_filled.at[consumer])

        @pl.loop(0, tile.count)
        def _(t):
            step = tile.steps_before + t
            stage = lax.rem(step, STAGES)
            rows = pl.ds((tile.end - 1 - t) * keys, keys)

            @pl.when(step >= STAGES)
            def _():
                plgpu.barrier_wait(k_freed.at[stage])

            for part, part_smem in zip(form.parts, k_smem, strict=True):
                source = part.of_keys(k, k_shared, tile.batch, rows, tile.head)
                plgpu.copy_gmem_to_smem(source, part_smem.at[stage], k_filled.at[stage])

            @pl.when(step >= STAGES)
            def _():
                plgpu.barrier_wait(v_freed.at[stage])

            plgpu.copy_gmem_to_smem(v.at[tile.batch, rows, tile.head], v_smem.at[stage], v_filled.at[stage])

    steps = for_each_tile(fill)

    # No barrier is dropped before all its arrivals are waited for.
    @pl.when(steps > 0)
    def _():
        for consumer in range(CONSUMERS):
            plgpu.barrier_wait(q_freed.at[consumer])

    @pl.loop(jnp.maximum(steps - STAGES, 0), steps)
    def _(step):
        plgpu.barrier_wait(k_freed.at[lax.rem(step, STAGES)])
        plgpu.barrier_wait(v_freed.at[lax.rem(step, STAGES)])


def _consume(
    for_each_tile, warpgroup, segments, out, log_sums, form: Form,
    *, q_smem, k_smem, v_smem, out_smem, log_sums_smem,
    q_filled, q_freed, k_filled, k_freed, v_filled, v_freed,
):  # fmt: skip
    """Attends from 64 rows of each tile."""
    keys = keys_per_tile(form)
    scale = form.exponent

    def multiply_keys(acc, stage):
        for q_part, k_part in zip(q_smem, k_smem, strict=True):
            plgpu.wgmma(acc, q_part.at[warpgroup], transposed(k_part.at[stage]))

    def attend(tile: Tile):
        row = tile.row + warpgroup * ROWS
        own_segment = segments[1][tile.batch, lax.div(tile.row, TILE)] if segments else None

        def stage_of(t):
            return lax.rem(tile.steps_before + t, STAGES)

        def masked(logits, t):
            ids = segments[0].at[tile.batch] if segments else None
            return mask(logits, form, row, (tile.end - 1 - t) * keys, ids)

        def masked_where_needed(logits, t):
            """Masks the tile of keys unless the queries see all of it."""
            needed = t < TILE // keys if form.causal and keys < TILE else False
            if segments:
                needed |= own_segment != segments[2][tile.batch, tile.end - 1 - t]
            if needed is False:
                return logits
            return lax.cond(needed, lambda: masked(logits, t), lambda: logits)

        def softmax(logits, largest, total):
            new_largest = jnp.maximum(largest, logits.max(axis=1) * scale)
            shrink = jnp.exp2(largest - new_largest)
            weights = jnp.exp2(logits * scale - over_columns(new_largest, logits.shape))
            return new_largest, total * shrink + weights.sum(axis=1), shrink, weights

        def all_keys(acc):
            plgpu.barrier_wait(k_filled.at[stage_of(0)])

            def first_logits(logits_acc):
                multiply_keys(logits_acc, stage_of(0))
                return logits_acc[...]

            logits_shape = plgpu.WGMMAAccumulatorRef((ROWS, keys), jnp.float32)
            logits = masked(pl.run_scoped(first_logits, logits_shape), 0)
            plgpu.barrier_arrive(k_freed.at[stage_of(0)])
            zeros = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), BY_ROW)
            largest, total, _, weights = softmax(logits, zeros + LOWEST, zeros)

            def step(t, carry):
                largest, total, weights = carry
                stage, previous = stage_of(t), stage_of(t - 1)

                def products(logits_acc):
                    multiply_keys(logits_acc, stage)
                    plgpu.barrier_wait(v_filled.at[previous])
                    plgpu.wgmma(acc, weights, v_smem.at[previous])
                    return plgpu.wgmma_accumulator_load(logits_acc, wait_n=1)

                logits = pl.run_scoped(products, logits_shape)
                plgpu.barrier_arrive(k_freed.at[stage])
                logits = masked_where_needed(logits, t)
                largest, total, shrink, weights = softmax(logits, largest, total)
                # The compilers would move the softmax behind the wait for the product that it should overlap with: LLVM
                # without this barrier, ptxas without the branch. Rounding comes after the wait, because the product
                # reads its weights from the registers of the rounded ones.
                largest, total, shrink, weights = lax.optimization_barrier((largest, total, shrink, weights))
                wait_for_keys(t + 1)
                attended = acc[...]
                plgpu.barrier_arrive(v_freed.at[previous])
                acc[...] = attended * over_columns(shrink, attended.shape)
                return largest, total, weights.astype(out.dtype)

            def wait_for_keys(t):
                @pl.when(t < tile.count)
                def _():
                    plgpu.barrier_wait(k_filled.at[stage_of(t)])

            wait_for_keys(1)
            carry = (largest, total, weights.astype(out.dtype))
            largest, total, weights = lax.fori_loop(1, tile.count, step, carry)
            last = stage_of(tile.count - 1)
            plgpu.barrier_wait(v_filled.at[last])
            plgpu.wgmma(acc, weights, v_smem.at[last])
            attended = acc[...]
            plgpu.barrier_arrive(v_freed.at[last])
            return attended, largest, total

        plgpu.barrier_wait(q_filled.at[warpgroup])
        attended, largest, total = pl.run_scoped(
            all_keys, plgpu.WGMMAAccumulatorRef((ROWS, form.value_width), jnp.float32)
        )
        write(tile, row, attended, largest, total)

    def write(tile: Tile, row, attended, largest, total):
        buffer = (q_smem[0] if out_smem is None else out_smem).at[warpgroup]
        buffer[...] = (attended * over_columns(1.0 / total, attended.shape)).astype(out.dtype)
        log_sums_smem[warpgroup, :] = largest * math.log(2) + jnp.log(total)
        plgpu.commit_smem()
        rows = pl.ds(row, ROWS)
        plgpu.copy_smem_to_gmem(log_sums_smem.at[warpgroup], log_sums.at[tile.batch, tile.head, rows])
        plgpu.copy_smem_to_gmem(buffer, out.at[tile.batch, rows, tile.head])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(q_freed.at[warpgroup])

    for_each_tile(attend)
    plgpu.wait_smem_to_gmem(0)
