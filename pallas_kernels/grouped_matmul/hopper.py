"""Grouped products on Hopper, in Mosaic GPU: bfloat16 and FP8, groups along the rows or along the contraction.

The pipeline is that of `blockwise_matmul/hopper.py`: a producer warpgroup has TMA fill a ring of stages, two consumer
warpgroups multiply with wgmma, a persistent grid visits the tiles. What differs is where a tile's operands come from:

    rows    tile t of 128 rows is within one group (sizes are multiples of 128); a table gives its group and how many
            of its rows count. A tile without rows takes no step of the contraction and only writes its zeros.
    depth   tile (g, i, j) of group g's own matrix contracts over the group's rows; a table gives where they start and
            how many steps they take. An empty group writes zeros. Where rows come in parts, a third table has the
            tiles of the rows in the order of the groups.

So the cost follows the number of rows, whatever the number of groups. A tile's number of steps is known only when it
runs: producer and consumers carry the position in the ring from tile to tile.

FP8 sums are promoted to float32 with their scales every 128 of the contraction; bfloat16 ones stay in the tensor core's
accumulator, where two steps' products are in flight.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.blockwise_matmul.tuning import TILE_M, WARPGROUP_ROWS
from pallas_kernels.device import once_a_program
from pallas_kernels.grouped_matmul.hopper_consumer import consume
from pallas_kernels.grouped_matmul.hopper_form import Form, Tile
from pallas_kernels.grouped_matmul.parts import TilesByGroup
from pallas_kernels.grouped_matmul.tiling import PART, WARPGROUPS, Tiling, choose_tiling
from pallas_kernels.hopper_launch import multiprocessors, pad_to, swizzled
from pallas_kernels.quantize.quantized import Quantized

PRODUCER = WARPGROUPS  # the third warpgroup
PRODUCER_REGISTERS = 40
CONSUMER_REGISTERS = 232
ALIKE = 64  # columns of bfloat16 in the widest swizzle, which both operands must have where wgmma transposes one

Interpret = plgpu.InterpretGPUParams | None


@once_a_program("out_dtype", "transposed", "tiling")
def rows_by_weights(
    lhs: Float[Array, "M K"] | Quantized,
    rhs: Float[Array, "G N K"] | Quantized,
    group_sizes: Int[Array, " G"],
    out_dtype: DTypeLike,
    *,
    transposed: bool = False,
    tiling: Tiling | None = None,
    interpret: Interpret = None,
) -> Float[Array, "M N"]:
    """Returns each row times its group's matrix; M and sizes are multiples of 128. `transposed`: `rhs` is [G, K, N]."""
    tiles = lhs.shape[0] // TILE_M
    ends = jnp.cumsum(group_sizes.astype(jnp.int32)) // TILE_M
    tile = jnp.arange(tiles, dtype=jnp.int32)
    group = jnp.minimum(jnp.searchsorted(ends, tile, side="right"), group_sizes.shape[0] - 1).astype(jnp.int32)
    present = jnp.where(tile < ends[-1], TILE_M, 0).astype(jnp.int32)
    form = Form("rows", isinstance(lhs, Quantized), row_major=transposed)
    return _rows(lhs, rhs, (group, present), form, jnp.dtype(out_dtype), tiling, interpret)


@once_a_program("out_dtype", "tiling")
def masked(
    lhs: Float[Array, "G M K"] | Quantized,
    rhs: Float[Array, "G N K"] | Quantized,
    counts: Int[Array, " G"],
    out_dtype: DTypeLike,
    *,
    tiling: Tiling | None = None,
    interpret: Interpret = None,
) -> Float[Array, "G M N"]:
    """Returns the first counts[g] rows of each group times its matrix, zeros after them. M is padded to 128s."""
    groups, height, _ = lhs.shape
    rows = jax.tree.map(lambda x: pad_to(x, TILE_M, 1), lhs)
    padded = rows.shape[1]
    rows = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), rows)
    tiles = padded // TILE_M
    group = jnp.repeat(jnp.arange(groups, dtype=jnp.int32), tiles)
    left = counts.astype(jnp.int32)[:, None] - TILE_M * jnp.arange(tiles, dtype=jnp.int32)
    present = jnp.clip(left, 0, TILE_M).reshape(-1)
    form = Form("rows", isinstance(lhs, Quantized), masked=True)
    out = _rows(rows, rhs, (group, present), form, jnp.dtype(out_dtype), tiling, interpret)
    return out.reshape(groups, padded, -1)[:, :height]


@once_a_program("tiling")
def rows_by_rows(
    lhs: Float[Array, "*P M N"] | Quantized,
    rhs: Float[Array, "*P M K"] | Quantized,
    group_sizes: Int[Array, "*P G"],
    accumulator: Float[Array, "G N K"] | None = None,
    *,
    tiling: Tiling | None = None,
    interpret: Interpret = None,
) -> Float[Array, "G N K"]:
    """Returns lhs[rows of g]ᵀ · rhs[rows of g] (+ accumulator); FP8 operands are [*P, N, M] and [*P, K, M].

    Sizes are multiples of 128. With an axis P the rows come in parts.
    """
    fp8 = isinstance(lhs, Quantized)
    form = Form("depth", fp8, row_major=not fp8, accumulates=accumulator is not None, in_parts=group_sizes.ndim == 2)
    rows_axis, width_axis = (-1, -2) if fp8 else (-2, -1)
    n, k, rows = lhs.shape[width_axis], rhs.shape[width_axis], lhs.shape[rows_axis]
    tables, parts, groups = [], group_sizes.shape[0] if form.in_parts else 1, group_sizes.shape[-1]
    if form.in_parts:
        order, steps = TilesByGroup.of(group_sizes, rows, form.depth)
        tables = [order]
    else:
        steps = group_sizes.astype(jnp.int32) // form.depth
    tables = [jnp.cumsum(steps) - steps, steps, *tables]
    if isinstance(lhs, Quantized) and isinstance(rhs, Quantized):
        operands = [pad_to(lhs.values, 8, 32), pad_to(rhs.values, 8, 32)]
        scales = [x.scales.mT.reshape(-1, x.shape[-2]) for x in (lhs, rhs)]  # [steps, width]
        if form.in_parts:
            scales = [x[tables[2]] for x in scales]
        scales = [pad_to(scales[0], TILE_M), pad_to(scales[1], 4)]
    else:
        flat = [x.reshape(-1, x.shape[-1]) for x in (lhs, rhs)]  # pyright: ignore[reportAttributeAccessIssue]
        operands, scales = [pad_to(x, 8, ALIKE) for x in flat], []
    tiling = tiling or choose_tiling("depth", k, parts * rows, groups, form.fp8, 4)
    shape = (groups, operands[0].shape[width_axis], operands[1].shape[width_axis])
    if accumulator is not None:
        scales.append(jnp.pad(accumulator, [(0, 0), (0, shape[1] - n), (0, shape[2] - k)]))
    out = _launch(tables, [*operands, *scales], shape, jnp.dtype(jnp.float32), form, tiling, interpret)
    return out if shape[1:] == (n, k) else out[:, :n, :k]


def _rows(lhs, rhs, tables, form: Form, out_dtype, tiling, interpret):
    (groups, first, second), contraction = rhs.shape, lhs.shape[1]
    n = second if form.row_major else first
    scales = []
    if form.fp8:
        scales = [pad_to(lhs.scales.T, 4), rhs.scales]
        lhs, rhs = lhs.values, rhs.values
    # TMA moves whole swizzled tiles: 8 rows, 32 bytes. So a row of the result is a multiple of 32 bytes, too.
    alike = 32 // out_dtype.itemsize
    operands = (
        [pad_to(lhs, 8, ALIKE), pad_to(rhs, 32, ALIKE)]
        if form.row_major
        else [pad_to(lhs, 8, 32), pad_to(rhs, alike, 32)]
    )
    tiling = tiling or choose_tiling("rows", n, contraction, groups, form.fp8, out_dtype.itemsize)
    columns = operands[1].shape[2 if form.row_major else 1]
    shape = (lhs.shape[0], columns)
    out = _launch(tables, [*operands, *scales], shape, out_dtype, form, tiling, interpret)
    return out if columns == n else out[:, :n]


def _launch(tables, operands, shape: tuple[int, ...], out_dtype, form: Form, tiling: Tiling, interpret: Interpret):
    a, b = operands[:2]
    stages, tile_n, cluster = tiling.stages, tiling.tile_n, tiling.cluster
    column_scales = form.fp8 and form.groups == "depth"
    # A consumer's part of the left operand, [rows, depth] or, groups along the depth in bfloat16, [depth, rows].
    a_tile = (form.depth, WARPGROUP_ROWS) if form.a_row_major else (WARPGROUP_ROWS, form.depth)
    b_tile = (form.depth, tile_n) if form.row_major else (tile_n, form.depth)
    freed: dict[str, Any] = {"num_arrivals": WARPGROUPS, "num_barriers": stages}
    scratch: dict[str, Any] = {
        "a_smem": plgpu.SMEM(
            (stages, WARPGROUPS, *a_tile), a.dtype, transforms=swizzled(a_tile[1], a.dtype, a.shape[-1])
        ),
        "b_smem": plgpu.SMEM((stages, *b_tile), b.dtype, transforms=swizzled(b_tile[1], b.dtype, b.shape[-1])),
        "b_scales_smem": plgpu.SMEM((stages, tile_n), jnp.float32) if column_scales else None,
        "out_smem": plgpu.SMEM(
            (WARPGROUPS, tiling.slots, WARPGROUP_ROWS, PART), out_dtype, transforms=swizzled(PART, out_dtype, shape[-1])
        ),
        "filled": plgpu.Barrier(num_arrivals=WARPGROUPS + 1 + column_scales, num_barriers=stages),
        "freed": plgpu.ClusterBarrier(collective_axes=("cluster",), **freed) if cluster > 1 else plgpu.Barrier(**freed),
        "accumulator_filled": plgpu.Barrier(num_barriers=WARPGROUPS) if form.accumulates else None,
    }
    kernel = plgpu.kernel(
        functools.partial(_kernel, form=form, tiling=tiling),
        out_type=jax.ShapeDtypeStruct(shape, out_dtype),
        scratch_types=scratch,
        grid=(multiprocessors() // cluster,),
        grid_names=("blocks",),
        cluster=(cluster,),
        cluster_names=("cluster",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name=f"grouped_matmul_{form.groups}_{'fp8' if form.fp8 else 'bf16'}",
        interpret=interpret,
    )
    return kernel(*tables, *operands)


def _kernel(*refs, form: Form, tiling: Tiling, **scratch):
    """The program of one block. `refs`: tables, a, b, (their scales, accumulator,) out, all in global memory."""
    count = 3 if form.in_parts else 2
    tables, (a, b, *scales, out) = refs[:count], refs[count:]
    accumulator = scales[-1] if form.accumulates else None
    warpgroup = lax.axis_index("warpgroup")
    for_each_tile = functools.partial(_for_each_tile, tables=tables, a=a, out=out, form=form, tiling=tiling)

    @pl.when(warpgroup == PRODUCER)
    def _():
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        _produce(for_each_tile, a, b, scales, tables[2:], form, tiling, **scratch)

    @pl.when(warpgroup != PRODUCER)
    def _():
        plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
        consume(for_each_tile, warpgroup, scales, accumulator, out, form, tiling, **scratch)


def _for_each_tile(body, *, tables, a, out, form: Form, tiling: Tiling):
    """Calls body(tile, steps before it) for each tile of this block; returns the number of all its steps.

    Columns change fastest: blocks that run together share rows of the left operand, and the group's matrix stays in L2
    for the group's next rows.
    """
    rows, columns = out.shape[-2:]
    row_tiles, column_tiles = pl.cdiv(rows, TILE_M), pl.cdiv(columns, tiling.tile_n * tiling.cluster)
    groups = out.shape[0] if form.groups == "depth" else 1
    rank = lax.axis_index("cluster")

    @plgpu.nd_loop((groups, row_tiles, column_tiles), collective_axes="blocks", init_carry=jnp.int32(0))
    def all_steps(loop, carry):
        steps_before = carry
        group, row_tile, column_tile = loop.index
        column = (column_tile * tiling.cluster + rank) * tiling.tile_n
        if form.groups == "depth":
            first_step, steps = tables[0][group], tables[1][group]
            tile = Tile(group, row_tile * TILE_M, column, first_step, steps, jnp.int32(TILE_M))
        else:
            present = tables[1][row_tile]
            steps = jnp.where(present > 0, pl.cdiv(a.shape[1], form.depth), 0)
            tile = Tile(tables[0][row_tile], row_tile * TILE_M, column, jnp.int32(0), steps, present)
        body(tile, steps_before)
        return steps_before + steps

    return all_steps


def _produce(
    for_each_tile, a, b, scales, order, form: Form, tiling: Tiling,
    *, a_smem, b_smem, b_scales_smem, filled, freed, **_,
):  # fmt: skip
    """Keeps the ring full: waits until both consumers have finished with a stage, then has TMA fill it again.

    `order` is a tuple with the table of the rows' tiles by group where they come in parts, else an empty one.
    """
    together = "cluster" if tiling.cluster > 1 else None

    def position(index):
        """Returns which tile of the rows is the one with that index by group."""
        return order[0][jnp.minimum(index, order[0].shape[0] - 1)] if order else index

    def fill_stages(tile: Tile, steps_before):
        columns = pl.ds(tile.column, tiling.tile_n)

        def fill(k, at):
            step = steps_before + k
            stage = lax.rem(step, tiling.stages)
            arrived = filled.at[stage]

            @pl.when(step >= tiling.stages)
            def _():
                plgpu.barrier_wait(freed.at[stage])
                if b_scales_smem is not None:
                    plgpu.commit_smem()  # orders the consumers' reads of the scales before TMA's next write

            upcoming = position(tile.first_step + k + 1)
            left, right = a, b.at[tile.group] if form.groups == "rows" else b
            if form.in_parts and form.fp8:
                part, at = lax.div(at, a.shape[-1] // form.depth), lax.rem(at, a.shape[-1] // form.depth)
                left, right = a.at[part], b.at[part]
            depth = pl.ds(at * form.depth, form.depth)
            for consumer in range(WARPGROUPS):
                rows = pl.ds(tile.row + consumer * WARPGROUP_ROWS, WARPGROUP_ROWS)
                source = left.at[depth, rows] if form.a_row_major else left.at[rows, depth]
                plgpu.copy_gmem_to_smem(source, a_smem.at[stage, consumer], arrived, collective_axes=together)
            source = right.at[depth, columns] if form.row_major else right.at[columns, depth]
            plgpu.copy_gmem_to_smem(source, b_smem.at[stage], arrived)
            if b_scales_smem is not None:
                source = scales[1].at[tile.first_step + k, columns]
                plgpu.copy_gmem_to_smem(source, b_scales_smem.at[stage], arrived)
            return upcoming

        lax.fori_loop(0, tile.steps, fill, position(tile.first_step))

    steps = for_each_tile(fill_stages)

    # A block must not end while the other block of its cluster may still write to it or signal it.
    @pl.loop(jnp.maximum(steps - tiling.stages, 0), steps)
    def _(step):
        plgpu.barrier_wait(freed.at[lax.rem(step, tiling.stages)])
