"""Absorbed decoding over pages on Hopper, in Mosaic GPU.

A block has 64 rows of queries (all heads of a token, of several tokens if heads are few) and a part of the sequence's
pages. A producer warpgroup has TMA fetch 64 entries at a time from the pages that the table names. An entry is key and
value at once, so it is fetched once. The accumulator of 64 x 512 latents is too large for one warpgroup: two
consumers have half of the columns each, and both compute the same logits.

Entries in e4m3 are widened to bfloat16, exactly, in shared memory, each consumer its half of the columns: a tensor core
multiplies FP8 by FP8 only. Their scales multiply logits and weights.

Sequences are split over blocks so that a few long ones keep all multiprocessors busy; the parts are put together with
the logarithms of their sums.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.device import once_a_program
from pallas_kernels.hopper_launch import multiprocessors, pad_to, swizzled
from pallas_kernels.latent_attention.hopper_form import (
    BY_COLUMN,
    BY_ROW,
    CONSUMER_REGISTERS,
    CONSUMERS,
    HIDDEN,
    LOG2_E,
    LOWEST,
    PRODUCER,
    PRODUCER_REGISTERS,
    ROWS,
    Interpret,
    over_columns,
    over_rows,
    transposed,
)
from pallas_kernels.latent_decode.operands import Operands

ENTRIES = 64  # of a stage
STAGES = 2
LEAST_TILES = 4  # of 64 entries, that a part of a sequence has when there are several parts


class Form(NamedTuple):
    """The static properties of a call."""

    page: int
    half: int  # columns of latents of a consumer
    rope: int
    exponent: float  # the factor of a logit in the exponent of 2
    parts: int  # of a sequence
    first: int  # entry that is seen
    fp8: bool  # latents are e4m3 with scales

    @property
    def copies(self) -> int:
        """Pieces of pages in a stage."""
        return max(ENTRIES // self.page, 1)


@once_a_program("scale", "first", "parts")
def decode(
    x: Operands, scale: float, first: int = 0, *, parts: int | None = None, interpret: Interpret = None
) -> Float[Array, "B T H c"]:
    """Computes `reference.decode`; each sequence in `parts` parts, chosen by the sizes unless given."""
    batch, tokens, heads, width = x.q_latent.shape
    page = x.latents.shape[1]
    queries = [pad_to(x.rows(q), ROWS, 1) for q in (x.q_latent, x.q_rope)]
    rows = queries[0].shape[1]
    row_tiles = rows // ROWS
    if parts is None:
        tiles = -(-x.table.shape[1] * page // ENTRIES)
        parts = max(1, min(multiprocessors() // (batch * row_tiles), tiles // LEAST_TILES))
    form = Form(page, width // CONSUMERS, x.q_rope.shape[-1], scale * LOG2_E, parts, first, x.scales is not None)
    last = x.last_entries()
    last = jnp.pad(last, ((0, 0), (0, rows - last.shape[1])), mode="edge").reshape(batch, row_tiles, ROWS)
    end = (last.max(axis=-1) + ENTRIES) // ENTRIES  # tiles that a row of the block sees
    whole = (last.min(axis=-1) + 1) // ENTRIES  # tiles that all of them see
    out, log_sums = plgpu.kernel(
        functools.partial(_kernel, form=form),
        out_type=[
            jax.ShapeDtypeStruct((parts, batch, rows, width), jnp.float32),
            jax.ShapeDtypeStruct((parts, batch, rows), jnp.float32),
        ],
        scratch_types=_scratch(form, x),
        grid=(multiprocessors(),),
        grid_names=("blocks",),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        kernel_name="latent_decode",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(end, whole, last.reshape(batch, rows), x.table.astype(jnp.int32), *queries, x.latents, x.rope_keys, *_scales(x))
    share = jax.nn.softmax(log_sums, axis=0)
    attended = jnp.sum(out * share[..., None], axis=0) if parts > 1 else out[0]
    return attended[:, : tokens * heads].reshape(x.q_latent.shape).astype(x.q_latent.dtype)


def _scales(x: Operands) -> list[Float[Array, "B positions"]]:
    """Returns the scales of each sequence in the order of its positions; none where entries have no scales.

    TMA writes to multiples of 128 bytes, and the scales of a small page are fewer: they are gathered before.
    """
    if x.scales is None:
        return []
    gathered = x.scales.at[x.table].get(mode="fill", fill_value=0)
    return [pad_to(gathered.reshape(gathered.shape[0], -1), ENTRIES)]


def _scratch(form: Form, x: Operands) -> dict[str, Any]:
    wide = x.q_latent.dtype

    def tiles(*shape: int, dtype=wide, alike: int = form.half) -> Any:
        return plgpu.SMEM(shape, dtype, transforms=swizzled(shape[-1], dtype, alike))

    entries = (CONSUMERS, ENTRIES, form.half)
    arrivals = form.copies * (CONSUMERS + 1) + form.fp8
    return {
        "q_smem": tiles(CONSUMERS, ROWS, form.half),
        "q_rope_smem": tiles(ROWS, form.rope),
        "stored_smem": tiles(STAGES, *entries, dtype=x.latents.dtype),
        "wide_smem": tiles(*entries) if form.fp8 else None,
        "scales_smem": plgpu.SMEM((STAGES, ENTRIES), jnp.float32) if form.fp8 else None,
        "rope_smem": tiles(STAGES, ENTRIES, form.rope),
        "q_filled": plgpu.Barrier(num_arrivals=CONSUMERS + 1),
        "q_freed": plgpu.Barrier(num_arrivals=CONSUMERS),
        "filled": plgpu.Barrier(num_arrivals=arrivals, num_barriers=STAGES),
        "freed": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=STAGES),
        # Of the one widened tile: both halves are written, and both consumers have multiplied by it.
        "widened": plgpu.Barrier(num_arrivals=CONSUMERS) if form.fp8 else None,
        "multiplied": plgpu.Barrier(num_arrivals=CONSUMERS) if form.fp8 else None,
    }


class Piece(NamedTuple):
    """A part of a sequence for 64 rows of queries."""

    batch: Array
    row_tile: Array
    part: Array
    start: Array  # the first tile of entries
    count: Array  # of tiles
    pieces_before: Array  # in this block
    steps_before: Array

    @property
    def rows(self) -> Any:
        return pl.ds(self.row_tile * ROWS, ROWS)


def _kernel(end, whole, last, table, q_latent, q_rope, latents, rope_keys, *refs, form: Form, **scratch):
    """The program of one block."""
    *scales, out, log_sums = refs
    warpgroup = lax.axis_index("warpgroup")

    def for_each_piece(body):
        """Calls body(piece) for every piece of this block; returns the numbers of pieces and of steps."""

        @plgpu.nd_loop((*end.shape, form.parts), collective_axes="blocks", init_carry=(jnp.int32(0), jnp.int32(0)))
        def done(loop, carry):
            pieces_before, steps_before = carry
            batch, row_tile, part = loop.index
            tiles = end[batch, row_tile]
            each = lax.div(tiles + form.parts - 1, form.parts)
            start = jnp.minimum(part * each, tiles)
            count = jnp.minimum(each, tiles - start)
            body(Piece(batch, row_tile, part, start, count, pieces_before, steps_before))
            return pieces_before + 1, steps_before + count

        return done

    @pl.when(warpgroup == PRODUCER)
    def _():
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        _produce(for_each_piece, table, q_latent, q_rope, latents, rope_keys, scales, form, **scratch)

    @pl.when(warpgroup != PRODUCER)
    def _():
        plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")

        def compute(piece: Piece):
            limit = plgpu.load(last.at[piece.batch, piece.rows], layout=BY_ROW, optimized=False)
            attended, log_sum = _consume(piece, whole[piece.batch, piece.row_tile], limit, warpgroup, form, **scratch)
            columns = pl.ds(warpgroup * form.half, form.half)
            out[piece.part, piece.batch, piece.rows, columns] = attended

            @pl.when(warpgroup == 0)
            def _():
                log_sums[piece.part, piece.batch, piece.rows] = log_sum

        _, steps = for_each_piece(compute)
        if form.fp8:

            @pl.when(steps > 0)
            def _():
                plgpu.barrier_wait(scratch["multiplied"])


def _produce(
    for_each_piece, table, q_latent, q_rope, latents, rope_keys, scales, form: Form,
    *, q_smem, q_rope_smem, stored_smem, rope_smem, scales_smem, q_filled, q_freed, filled, freed, **_,
):  # fmt: skip
    """Brings the queries, then 64 entries at a time."""
    halves = [pl.ds(half * form.half, form.half) for half in range(CONSUMERS)]
    size = min(form.page, ENTRIES)

    def fill(piece: Piece):
        @pl.when(piece.pieces_before > 0)
        def _():
            plgpu.barrier_wait(q_freed)

        for half, columns in enumerate(halves):
            plgpu.copy_gmem_to_smem(q_latent.at[piece.batch, piece.rows, columns], q_smem.at[half], q_filled)
        plgpu.copy_gmem_to_smem(q_rope.at[piece.batch, piece.rows], q_rope_smem, q_filled)

        @pl.loop(0, piece.count)
        def _(t):
            step = piece.steps_before + t
            stage = lax.rem(step, STAGES)

            @pl.when(step >= STAGES)
            def _():
                plgpu.barrier_wait(freed.at[stage])
                if form.fp8:
                    plgpu.commit_smem()  # orders the consumers' ordinary reads before TMA's next write

            for copy in range(form.copies):
                position = (piece.start + t) * ENTRIES + copy * size
                # Entries past the end of the table or without a page are hidden: any page will do.
                index = jnp.minimum(lax.div(position, form.page), table.shape[1] - 1)
                page = jnp.minimum(table[piece.batch, index], latents.shape[0] - 1)
                within, target = pl.ds(lax.rem(position, form.page), size), pl.ds(copy * size, size)
                for half, columns in enumerate(halves):
                    source = latents.at[page, within, columns]
                    plgpu.copy_gmem_to_smem(source, stored_smem.at[stage, half, target], filled.at[stage])
                plgpu.copy_gmem_to_smem(rope_keys.at[page, within], rope_smem.at[stage, target], filled.at[stage])
            if form.fp8:
                entries = pl.ds((piece.start + t) * ENTRIES, ENTRIES)
                plgpu.copy_gmem_to_smem(scales[0].at[piece.batch, entries], scales_smem.at[stage], filled.at[stage])

    pieces, steps = for_each_piece(fill)

    # No barrier is dropped before all its arrivals are waited for.
    @pl.when(pieces > 0)
    def _():
        plgpu.barrier_wait(q_freed)

    @pl.loop(jnp.maximum(steps - STAGES, 0), steps)
    def _(step):
        plgpu.barrier_wait(freed.at[lax.rem(step, STAGES)])


def _consume(
    piece: Piece, whole, limit, warpgroup, form: Form,
    *, q_smem, q_rope_smem, stored_smem, wide_smem, rope_smem, scales_smem,
    q_filled, q_freed, filled, freed, widened, multiplied,
):  # fmt: skip
    """Returns half of the columns of the attended latents, and the logarithms of the rows' sums."""
    plgpu.barrier_wait(q_filled)

    def latents_of(stage, half):
        return wide_smem.at[half] if form.fp8 else stored_smem.at[stage, half]

    def widen(step, stage):
        """Converts this consumer's half of the entries once the other one needs the tile before no more."""

        @pl.when(step > 0)
        def _():
            plgpu.barrier_wait(multiplied)

        stored = plgpu.load(stored_smem.at[stage, warpgroup], layout=plgpu.Layout.WGMMA_8BIT)
        wide_smem[warpgroup] = stored.astype(jnp.float32).astype(wide_smem.dtype)
        plgpu.commit_smem()
        plgpu.barrier_arrive(widened)
        plgpu.barrier_wait(widened)

    def scales_of(stage, shape):
        return over_rows(plgpu.load(scales_smem.at[stage], layout=BY_COLUMN), shape)

    def logits_of(stage):
        def of_latents(acc):
            for half in range(CONSUMERS):
                plgpu.wgmma(acc, q_smem.at[half], transposed(latents_of(stage, half)))

        def of_rope(acc):
            plgpu.wgmma(acc, q_rope_smem, transposed(rope_smem.at[stage]))

        def together(acc):
            of_latents(acc)
            of_rope(acc)
            return acc[...]

        def apart(acc, rope_acc):
            of_latents(acc)
            of_rope(rope_acc)
            logits = acc[...]
            return logits * scales_of(stage, logits.shape) + rope_acc[...]

        accumulator = plgpu.WGMMAAccumulatorRef((ROWS, ENTRIES), jnp.float32)
        return pl.run_scoped(apart, accumulator, accumulator) if form.fp8 else pl.run_scoped(together, accumulator)

    def masked(logits, tile):
        entry = plgpu.broadcasted_iota(jnp.int32, logits.shape, 1, layout=plgpu.Layout.WGMMA) + tile * ENTRIES
        visible = over_columns(limit, logits.shape) >= entry
        if form.first:
            visible &= entry >= form.first
        return jnp.where(visible, logits, HIDDEN)

    def all_entries(acc):
        def step(t, carry):
            largest, total = carry
            stage = lax.rem(piece.steps_before + t, STAGES)
            plgpu.barrier_wait(filled.at[stage])
            if form.fp8:
                widen(piece.steps_before + t, stage)
            logits, tile = logits_of(stage), piece.start + t
            hides = tile >= whole
            if form.first:
                hides |= tile * ENTRIES < form.first
            logits = lax.cond(hides, lambda: masked(logits, tile), lambda: logits)
            now = jnp.maximum(largest, logits.max(axis=1) * form.exponent)
            shrink = jnp.exp2(largest - now)
            weights = jnp.exp2(logits * form.exponent - over_columns(now, logits.shape))
            attended = acc[...]
            acc[...] = attended * over_columns(shrink, attended.shape)
            total = total * shrink + weights.sum(axis=1)
            if form.fp8:
                weights = weights * scales_of(stage, weights.shape)
            plgpu.wgmma(acc, weights.astype(q_smem.dtype), latents_of(stage, warpgroup))
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(freed.at[stage])
            if form.fp8:
                plgpu.barrier_arrive(multiplied)
            return now, total

        zeros = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), BY_ROW)
        largest, total = lax.fori_loop(0, piece.count, step, (zeros + LOWEST, zeros))
        return acc[...], largest, total

    accumulator = plgpu.WGMMAAccumulatorRef((ROWS, form.half), jnp.float32)
    attended, largest, total = pl.run_scoped(all_entries, accumulator)
    plgpu.barrier_arrive(q_freed)
    some = jnp.maximum(total, 1e-30)  # rows that see nothing have sums of zero
    return attended * over_columns(1.0 / some, attended.shape), (largest + jnp.log2(some)) / LOG2_E
