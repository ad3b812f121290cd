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
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.device import once_a_program
from pallas_kernels.hopper_launch import multiprocessors, pad_to, swizzled
from pallas_kernels.latent_attention.hopper_backward_consumer import consume
from pallas_kernels.latent_attention.hopper_backward_plan import Arrays, Plan, Side, Tile
from pallas_kernels.latent_attention.hopper_form import (
    CONSUMER_REGISTERS,
    CONSUMERS,
    PRODUCER,
    PRODUCER_REGISTERS,
    ROWS,
    TILE,
    Form,
    Interpret,
    make_form,
    segment_tables,
)
from pallas_kernels.latent_attention.operands import OfResult, Operands
from pallas_kernels.latent_attention.tiles import key_tiles, query_tiles

BLOCKS_WANTED = 4  # pieces of work per multiprocessor, before heads are put together in one


@once_a_program("scale", "causal")
def backward(
    x: Operands, result: OfResult, scale: float, causal: bool, *, interpret: Interpret = None
) -> tuple[Array, Array, Array, Array | None]:
    """Returns the gradients of q, k, v and k_shared."""
    form = make_form(x, scale, causal)
    (batch, length, heads, _), dtype = x.q.shape, x.q.dtype
    k_shared, segment_ids = x.k_shared, x.segment_ids
    operands = [pad_to(array, 8, 1, 1) for array in (x.q, x.k, x.v, result.gradient.astype(dtype))]
    operands += [pad_to(statistic, TILE) for statistic in (result.log_sums, result.mean)]
    if k_shared is not None:
        operands.append(pad_to(k_shared, 8, 1))
    shapes = [jax.ShapeDtypeStruct(array.shape, dtype) for array in operands[:3]]

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
        consume(for_each_tile, warpgroup, arrays, segments, optional, plan, **scratch)


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
