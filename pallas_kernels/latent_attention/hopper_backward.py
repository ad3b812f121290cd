"""The backward pass of training attention on Hopper, in Mosaic GPU: one kernel for dQ, one for dK and dV.

Both recompute the weights P from the logarithms of the rows' sums, so that no logits are kept, and both are the same
program with queries and keys in different roles. A block has 128 rows of one side in shared memory, two consumers 64
each, and a producer streams tiles of the other side through a ring of stages:

    own rows are queries      S = Q Kᵀ     dP = dO Vᵀ     dS = P (dP - mean)     dQ += dS K
    own rows are keys         Sᵀ = K Qᵀ    dPᵀ = V dOᵀ    dSᵀ = Pᵀ (dPᵀ - mean)  dK += dSᵀ Q,  dV += Pᵀ dO

`mean` is a row's sum of P dP. All sums stay in the accumulators of the tensor cores, weights and dS go from registers
to the next product, and nothing is added up with atomics: the result is the same every time. The price is that S and dP
are computed twice, 7 products instead of 5.

The gradient of the keys that heads share stays in its accumulator from head to head; blocks of the same keys with
different heads write partial sums.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.device import once_a_program
from pallas_kernels.hopper_launch import SHARED_MEMORY_BYTES, multiprocessors, pad_to, swizzled
from pallas_kernels.latent_attention.hopper_form import (
    BY_COLUMN,
    BY_ROW,
    CONSUMER_REGISTERS,
    CONSUMERS,
    PRODUCER,
    PRODUCER_REGISTERS,
    ROWS,
    TILE,
    Form,
    Interpret,
    make_form,
    mask,
    over_columns,
    over_rows,
    segment_tables,
    transposed,
)
from pallas_kernels.latent_attention.tiles import key_tiles, query_tiles

MOST_ROWS = 192  # of the other side in the ring
BLOCKS_WANTED = 4  # pieces of work per multiprocessor, before heads are put together in one

Side = Literal["queries", "keys"]


class Plan(NamedTuple):
    """The static properties of one of the two kernels.

    Attributes:
      side: what the block's own rows are.
      other: rows of the other side in a stage.
      heads: heads that a block computes one after the other, with one sum for the keys that they share.
    """

    form: Form
    side: Side
    other: int
    heads: int = 1

    @property
    def shares(self) -> bool:
        return self.side == "keys" and any(part.shared for part in self.form.parts)

    @property
    def stages(self) -> int:
        width = sum(part.width for part in self.form.parts) + self.form.value_width
        stage_bytes = self.other * (width * 2 + 8)
        return min((SHARED_MEMORY_BYTES - TILE * width * 2 - 4096) // stage_bytes, MOST_ROWS // self.other)


@once_a_program("scale", "causal")
def backward(
    q: Float[Array, "B T H qk"],
    k: Float[Array, "B T H c"],
    v: Float[Array, "B T H v"],
    k_shared: Float[Array, "B T r"] | None,
    segment_ids: Int[Array, "B T"] | None,
    gradient: Float[Array, "B T H v"],
    log_sums: Float[Array, "B H T"],
    mean: Float[Array, "B H T"],
    scale: float,
    causal: bool,
    *,
    interpret: Interpret = None,
) -> tuple[Array, Array, Array, Array | None]:
    """Returns the gradients of q, k, v and k_shared; the other operands are those of the forward pass.

    Args:
      gradient: of the attended values.
      log_sums: natural logarithms of the rows' sums of exponentials.
      mean: each row's sum of attended values times their gradients.
    """
    form = make_form(q, k, v, k_shared, segment_ids, scale, causal)
    batch, length, heads, _ = q.shape
    operands = [pad_to(x, 8, 1, 1) for x in (q, k, v, gradient.astype(q.dtype))]
    operands += [pad_to(x, TILE) for x in (log_sums, mean)]
    if k_shared is not None:
        operands.append(pad_to(k_shared, 8, 1))
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands[:3]]

    plan = Plan(form, "queries", 64)
    tables = key_tiles(segment_ids, batch, length, TILE, plan.other, causal)
    segments = segment_tables(segment_ids, TILE, plan.other)
    (dq,) = _launch([*tables, *operands, *segments], shapes[:1], plan, interpret)

    plan = Plan(form, "keys", _queries_at_once(form), _heads_of_a_block(form, batch, heads))
    tables = query_tiles(segment_ids, batch, length, TILE, plan.other, causal)
    segments = segment_tables(segment_ids, plan.other, TILE)
    outputs = shapes[1:]
    if plan.shares:
        partial = (heads // plan.heads, batch, -(-length // TILE) * TILE, form.parts[-1].width)
        outputs = [*outputs, jax.ShapeDtypeStruct(partial, jnp.float32)]
    dk, dv, *partial = _launch([*tables, *operands, *segments], outputs, plan, interpret)
    to_shared = None if k_shared is None else partial[0].sum(axis=0)[:, :length].astype(k_shared.dtype)
    return dq[:, :length], dk[:, :length], dv[:, :length], to_shared


def _queries_at_once(form: Form) -> int:
    """Returns 64, or 32 where the accumulators of wide heads would leave too few registers."""
    return 64 if sum(part.width for part in form.parts) + form.value_width <= 192 else 32


def _heads_of_a_block(form: Form, batch: int, heads: int) -> int:
    """Returns the most heads of a block that leave work for all multiprocessors; 1 if heads share nothing."""
    if not any(part.shared for part in form.parts):
        return 1
    pieces = batch * -(-form.length // (2 * TILE))
    wanted = BLOCKS_WANTED * multiprocessors()
    return max(n for n in range(1, heads + 1) if heads % n == 0 and (n == 1 or pieces * heads // n >= wanted))


def _launch(operands, out_types, plan: Plan, interpret: Interpret):
    return plgpu.kernel(
        functools.partial(_kernel, plan=plan),
        out_type=out_types,
        scratch_types=_scratch(plan, operands[2].dtype),
        grid=(multiprocessors(),),
        grid_names=("blocks",),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        kernel_name=f"latent_attention_backward_{plan.side}",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(*operands)


def _scratch(plan: Plan, dtype) -> dict[str, Any]:
    form, stages = plan.form, plan.stages

    def tiles(*shape: int, alike: int = form.value_width) -> Any:
        # As rows of the right operand of a product, the other side's are a multiple of the swizzle's columns.
        return plgpu.SMEM(shape, dtype, transforms=swizzled(shape[-1], dtype, math.gcd(alike, plan.other)))

    statistic = plgpu.SMEM((stages, plan.other), jnp.float32) if plan.side == "keys" else None
    arrivals = len(form.parts) + 1
    return {
        # Queries or keys, and values or gradients of attended values.
        "own_smem": [tiles(CONSUMERS, ROWS, part.width, alike=part.alike) for part in form.parts],
        "own_value_smem": tiles(CONSUMERS, ROWS, form.value_width),
        "other_smem": [tiles(stages, plan.other, part.width, alike=part.alike) for part in form.parts],
        "other_value_smem": tiles(stages, plan.other, form.value_width),
        "log_sums_smem": statistic,
        "mean_smem": statistic,
        "own_filled": plgpu.Barrier(num_arrivals=arrivals, num_barriers=CONSUMERS),
        "own_freed": plgpu.Barrier(num_barriers=CONSUMERS),
        "filled": plgpu.Barrier(num_arrivals=arrivals + 2 * (plan.side == "keys"), num_barriers=stages),
        "freed": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),
    }


class Arrays(NamedTuple):
    """The operands in global memory."""

    q: Any
    k: Any
    v: Any
    gradient: Any
    log_sums: Any
    mean: Any
    k_shared: Any

    def of(self, side: Side, form: Form, batch, rows, head) -> list[Any]:
        """Returns the parts of queries or keys, then the gradients of attended values or the values."""
        if side == "queries":
            parts = [part.of_queries(self.q, batch, rows, head) for part in form.parts]
            return [*parts, self.gradient.at[batch, rows, head]]
        parts = [part.of_keys(self.k, self.k_shared, batch, rows, head) for part in form.parts]
        return [*parts, self.v.at[batch, rows, head]]


class Tile(NamedTuple):
    """One tile of own rows and its range of tiles of the other side, for several heads."""

    batch: Array
    group: Array  # of heads
    index: Array
    first: Array  # tile of the other side
    count: Array  # of tiles of the other side
    steps_before: Array  # in this block

    def other(self, plan: Plan, t):
        """Returns the t-th tile of the other side: first those on the diagonal."""
        return self.first + (self.count - 1 - t if plan.side == "queries" else t)


def _kernel(first, end, *refs, plan: Plan, **scratch):
    """The program of one block. All arguments are in global memory."""
    inputs, optional = refs[:6], list(refs[6:])
    k_shared = optional.pop(0) if any(part.shared for part in plan.form.parts) else None
    arrays = Arrays(*inputs, k_shared=k_shared)
    segments = [optional.pop(0) for _ in range(3)] if plan.form.segmented else None
    warpgroup = lax.axis_index("warpgroup")
    groups = arrays.q.shape[2] // plan.heads
    for_each_tile = functools.partial(_for_each_tile, first=first, end=end, groups=groups, heads=plan.heads)

    @pl.when(warpgroup == PRODUCER)
    def _():
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        _produce(for_each_tile, arrays, plan, **scratch)

    @pl.when(warpgroup != PRODUCER)
    def _():
        plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
        _consume(for_each_tile, warpgroup, arrays, segments, optional, plan, **scratch)


def _for_each_tile(body, *, first, end, groups: int, heads: int) -> Any:
    """Calls body(tile) for each tile of own rows of this block; returns the number of all its steps.

    As in the forward kernel, tiles from both ends are taken together, so that all blocks have the same work.
    """
    batch, tiles = first.shape

    @plgpu.nd_loop((batch, groups, pl.cdiv(tiles, 2)), collective_axes="blocks", init_carry=jnp.int32(0))
    def all_steps(loop, carry):
        row_of_batch, group, pair = loop.index

        def one_tile(member, steps_before):
            index = jnp.where(member == 0, tiles - 1 - pair, pair)
            start = first[row_of_batch, index]
            count = end[row_of_batch, index] - start
            count = jnp.where((member == 1) & (2 * pair == tiles - 1), 0, count)  # the middle one has no other

            @pl.when(count > 0)
            def _():
                body(Tile(row_of_batch, group, index, start, count, steps_before))

            return steps_before + count * heads

        return lax.fori_loop(0, 2, one_tile, carry)

    return all_steps


def _produce(
    for_each_tile, arrays: Arrays, plan: Plan,
    *, own_smem, own_value_smem, other_smem, other_value_smem, log_sums_smem, mean_smem,
    own_filled, own_freed, filled, freed,
):  # fmt: skip
    """Brings each consumer's own rows when its previous results have left, and keeps the ring full."""
    other_side: Side = "keys" if plan.side == "queries" else "queries"

    def fill(tile: Tile):
        @pl.loop(0, plan.heads)
        def _(i):
            head = tile.group * plan.heads + i
            steps_before = tile.steps_before + i * tile.count
            for consumer in range(CONSUMERS):

                @pl.when(steps_before > 0)
                def _(consumer=consumer):
                    plgpu.barrier_wait(own_freed.at[consumer])

                rows = pl.ds(tile.index * TILE + consumer * ROWS, ROWS)
                sources = arrays.of(plan.side, plan.form, tile.batch, rows, head)
                for source, target in zip(sources, [*own_smem, own_value_smem], strict=True):
                    plgpu.copy_gmem_to_smem(source, target.at[consumer], own_filled.at[consumer])

            @pl.loop(0, tile.count)
            def _(t):
                step = steps_before + t
                stage = lax.rem(step, plan.stages)

                @pl.when(step >= plan.stages)
                def _():
                    plgpu.barrier_wait(freed.at[stage])

                rows = pl.ds(tile.other(plan, t) * plan.other, plan.other)
                sources = arrays.of(other_side, plan.form, tile.batch, rows, head)
                targets = [*other_smem, other_value_smem]
                if log_sums_smem is not None:
                    sources += [x.at[tile.batch, head, rows] for x in (arrays.log_sums, arrays.mean)]
                    targets += [log_sums_smem, mean_smem]
                for source, target in zip(sources, targets, strict=True):
                    plgpu.copy_gmem_to_smem(source, target.at[stage], filled.at[stage])

    steps = for_each_tile(fill)

    # No barrier is dropped before all its arrivals are waited for.
    @pl.when(steps > 0)
    def _():
        for consumer in range(CONSUMERS):
            plgpu.barrier_wait(own_freed.at[consumer])

    @pl.loop(jnp.maximum(steps - plan.stages, 0), steps)
    def _(step):
        plgpu.barrier_wait(freed.at[lax.rem(step, plan.stages)])


def _consume(
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
