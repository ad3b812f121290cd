"""Grouped products on TPUs, in Mosaic TPU: bfloat16 and FP8, groups along the rows or along the contraction.

Tables that say which group a tile of 128 rows belongs to are read ahead of the grid (scalar prefetch), so the pipeline
fetches the right matrix. With groups along the rows, a step has the whole contraction, and a piece of a group's matrix
stays in VMEM for all of the group's tiles. With groups along the contraction, a group's product stays in VMEM while the
products of its tiles are added to it; an empty group gets one step, which writes its zeros.

v5p and v6e have no FP8 matrix unit: operands are e4m3 in HBM and VMEM and are widened to bfloat16, exactly.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.device import LANES, once_a_program
from pallas_kernels.grouped_matmul.alignment import ROW_ALIGNMENT
from pallas_kernels.grouped_matmul.parts import TilesByGroup
from pallas_kernels.quantize.quantized import PROMOTION_INTERVAL, TILE, Quantized

TILE_M = ROW_ALIGNMENT  # rows of a block's tile, all of one group
_WEIGHT_BYTES = 4 << 20  # bytes of a group's matrix in VMEM at a time
_VMEM_BYTES = 48 << 20
_DEPTH_TILE = 512

Interpret = pltpu.InterpretParams | None


@once_a_program("out_dtype", "transposed")
def rows_by_weights(
    lhs: Float[Array, "M K"] | Quantized,
    rhs: Float[Array, "G N K"] | Quantized,
    group_sizes: Int[Array, " G"],
    out_dtype: DTypeLike,
    *,
    transposed: bool = False,
    interpret: Interpret = None,
) -> Float[Array, "M N"]:
    """Returns each row times its group's matrix; M and sizes are multiples of 128. `transposed`: `rhs` is [G, K, N]."""
    tiles = lhs.shape[0] // TILE_M
    ends = jnp.cumsum(group_sizes.astype(jnp.int32)) // TILE_M
    tile = jnp.arange(tiles, dtype=jnp.int32)
    group = jnp.minimum(jnp.searchsorted(ends, tile, side="right"), group_sizes.shape[0] - 1).astype(jnp.int32)
    present = jnp.where(tile < ends[-1], TILE_M, 0).astype(jnp.int32)
    return _rows(lhs, rhs, group, present, jnp.dtype(out_dtype), transposed, interpret)


@once_a_program("out_dtype")
def masked(
    lhs: Float[Array, "G M K"] | Quantized,
    rhs: Float[Array, "G N K"] | Quantized,
    counts: Int[Array, " G"],
    out_dtype: DTypeLike,
    *,
    interpret: Interpret = None,
) -> Float[Array, "G M N"]:
    """Returns the first counts[g] rows of each group times its matrix, zeros after them. M is padded to 128s."""
    groups, height, _ = lhs.shape
    padded = height + -height % TILE_M
    rows = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, padded - height), (0, 0))) if padded != height else x, lhs)
    rows = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), rows)
    tiles = padded // TILE_M
    group = jnp.repeat(jnp.arange(groups, dtype=jnp.int32), tiles)
    left = counts.astype(jnp.int32)[:, None] - TILE_M * jnp.arange(tiles, dtype=jnp.int32)
    present = jnp.clip(left, 0, TILE_M).reshape(-1)
    out = _rows(rows, rhs, group, present, jnp.dtype(out_dtype), False, interpret)
    return out.reshape(groups, padded, -1)[:, :height]


@once_a_program()
def rows_by_rows(
    lhs: Float[Array, "*P M N"] | Quantized,
    rhs: Float[Array, "*P M K"] | Quantized,
    group_sizes: Int[Array, "*P G"],
    accumulator: Float[Array, "G N K"] | None = None,
    *,
    interpret: Interpret = None,
) -> Float[Array, "G N K"]:
    """Returns lhs[rows of g]ᵀ · rhs[rows of g] (+ accumulator); FP8 operands are [*P, N, M] and [*P, K, M].

    Sizes are multiples of 128. With an axis P the rows come in parts.
    """
    tiles = lhs.shape[-1 if isinstance(lhs, Quantized) else -2] // TILE_M  # of a part
    order, counts = TilesByGroup.of(group_sizes.reshape(-1, group_sizes.shape[-1]), tiles * TILE_M, TILE_M)
    group, row_tile, action = _visits(order, counts)
    groups = group_sizes.shape[-1]
    if isinstance(lhs, Quantized) and isinstance(rhs, Quantized):
        n, k = lhs.shape[-2], rhs.shape[-2]
        tile_n, tile_k = min(_DEPTH_TILE, n + -n % LANES), min(_DEPTH_TILE, k + -k % LANES)
        values = [x.values.reshape(-1, *x.shape[-2:]) for x in (lhs, rhs)]
        operands = [*values, *(x.scales.mT.reshape(-1, 1, x.shape[-2]) for x in (lhs, rhs))]

        def of_tile(tile: Array) -> tuple[Array, Array]:
            return lax.div(tile, jnp.int32(tiles)), lax.rem(tile, jnp.int32(tiles))

        def columns(index: int) -> Any:
            def block(i, j, v, group, row_tile, action):
                part, within = of_tile(row_tile[v])
                return part, (i, j)[index], within

            return block

        in_specs = [
            pl.BlockSpec((None, tile_n, TILE_M), columns(0)),
            pl.BlockSpec((None, tile_k, TILE_M), columns(1)),
            pl.BlockSpec((1, 1, tile_n), lambda i, j, v, group, row_tile, action: (row_tile[v], 0, i)),
            pl.BlockSpec((1, 1, tile_k), lambda i, j, v, group, row_tile, action: (row_tile[v], 0, j)),
        ]
    else:
        n, k = lhs.shape[-1], rhs.shape[-1]
        tile_n, tile_k = min(_DEPTH_TILE, n + -n % LANES), min(_DEPTH_TILE, k + -k % LANES)
        operands = [x.reshape(-1, x.shape[-1]) for x in (lhs, rhs)]  # pyright: ignore[reportAttributeAccessIssue]
        in_specs = [
            pl.BlockSpec((TILE_M, tile_n), lambda i, j, v, group, row_tile, action: (row_tile[v], i)),
            pl.BlockSpec((TILE_M, tile_k), lambda i, j, v, group, row_tile, action: (row_tile[v], j)),
        ]
    of_group = pl.BlockSpec((1, tile_n, tile_k), lambda i, j, v, group, row_tile, action: (group[v], i, j))
    if accumulator is not None:
        operands.append(accumulator)
        in_specs.append(of_group)
    return pl.pallas_call(
        functools.partial(_depth_kernel, accumulates=accumulator is not None),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(pl.cdiv(n, tile_n), pl.cdiv(k, tile_k), group.shape[0]),
            in_specs=in_specs,
            out_specs=of_group,
        ),
        out_shape=jax.ShapeDtypeStruct((groups, n, k), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
        ),
        interpret=interpret or False,
        name="grouped_matmul_depth",
    )(group, row_tile, action, *operands)


_SKIP, _ADD, _START, _ZERO = range(4)


def _visits(order: Int[Array, " tiles"], counts: Int[Array, " G"]) -> tuple[Array, Array, Array]:
    """Returns the group, the tile of rows and the action of each step; an empty group gets one step.

    Args:
      order, counts: those of `TilesByGroup`.
    """
    visits = jnp.maximum(counts, 1)
    ends, groups = jnp.cumsum(visits), counts.shape[0]
    step = jnp.arange(order.shape[0] + groups, dtype=jnp.int32)
    group = jnp.minimum(jnp.searchsorted(ends, step, side="right"), groups - 1).astype(jnp.int32)
    within = step - (ends - visits)[group]
    row_tile = order[jnp.clip((jnp.cumsum(counts) - counts)[group] + within, 0, order.shape[0] - 1)]
    first = jnp.where(counts[group] > 0, _START, _ZERO)
    action = jnp.where(step >= ends[-1], _SKIP, jnp.where(within == 0, first, _ADD))
    return group, row_tile, action.astype(jnp.int32)


def _rows(lhs, rhs, group, present, out_dtype, transposed: bool, interpret: Interpret):
    contraction = lhs.shape[1]
    n = rhs.shape[2 if transposed else 1]
    itemsize = 1 if isinstance(lhs, Quantized) else lhs.dtype.itemsize
    widest = max(_WEIGHT_BYTES // (contraction * itemsize) // LANES * LANES, LANES)
    tile_n = min(widest, _DEPTH_TILE, n + -n % LANES)
    operands: list[Any] = [lhs, rhs]
    if isinstance(lhs, Quantized):
        blocks = pl.cdiv(contraction, PROMOTION_INTERVAL)
        excess = -contraction % PROMOTION_INTERVAL
        a, b = (jnp.pad(q.values, [(0, 0)] * (q.values.ndim - 1) + [(0, excess)]) for q in (lhs, rhs))
        # One scale per column of the product and block of the contraction, with N along the lanes as in the product.
        b_scales = jnp.repeat(rhs.scales, TILE, axis=1)[:, :n].swapaxes(1, 2)[:, :, None]
        operands, contraction = [a, b, lhs.scales, b_scales], contraction + excess
    in_specs = [pl.BlockSpec((TILE_M, contraction), lambda j, i, group, present: (i, 0))]
    if transposed:
        in_specs.append(pl.BlockSpec((1, contraction, tile_n), lambda j, i, group, present: (group[i], 0, j)))
    else:
        in_specs.append(pl.BlockSpec((1, tile_n, contraction), lambda j, i, group, present: (group[i], j, 0)))
    if isinstance(lhs, Quantized):
        in_specs.append(pl.BlockSpec((TILE_M, blocks), lambda j, i, group, present: (i, 0)))
        in_specs.append(pl.BlockSpec((1, blocks, 1, tile_n), lambda j, i, group, present: (group[i], 0, 0, j)))
    return pl.pallas_call(
        functools.partial(_rows_kernel, transposed=transposed),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(pl.cdiv(n, tile_n), lhs.shape[0] // TILE_M),
            in_specs=in_specs,
            out_specs=pl.BlockSpec((TILE_M, tile_n), lambda j, i, group, present: (i, j)),
        ),
        out_shape=jax.ShapeDtypeStruct((lhs.shape[0], n), out_dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
        ),
        interpret=interpret or False,
        name="grouped_matmul_rows",
    )(group, present, *operands)


def _rows_kernel(group_ref, present_ref, a_ref, b_ref, *refs, transposed: bool):
    """The program of a grid step. `refs` are the scales of both operands if they are FP8, and the product's tile."""
    *scales, out_ref = refs
    present = present_ref[pl.program_id(1)]

    @pl.when(present == 0)
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)

    @pl.when(present > 0)
    def _():
        if scales:
            total = _promoted(a_ref, b_ref.at[0], scales[0], scales[1].at[0], out_ref.shape)
        else:
            contracted = 0 if transposed else 1
            total = _dot(a_ref[...], b_ref[0], (1, contracted))
        row = lax.broadcasted_iota(jnp.int32, total.shape, 0)
        out_ref[...] = jnp.where(row < present, total, 0).astype(out_ref.dtype)


def _promoted(a_ref, b_ref, a_scales_ref, b_scales_ref, shape) -> Float[Array, "128 tile_n"]:
    def add_block(s, total):
        at = pl.ds(pl.multiple_of(s * PROMOTION_INTERVAL, PROMOTION_INTERVAL), PROMOTION_INTERVAL)
        partial = _dot(a_ref[:, at].astype(jnp.bfloat16), b_ref[:, at].astype(jnp.bfloat16), (1, 1))
        return total + partial * _column(a_scales_ref[...], s) * b_scales_ref[s]

    return lax.fori_loop(0, a_ref.shape[1] // PROMOTION_INTERVAL, add_block, jnp.zeros(shape, jnp.float32))


def _depth_kernel(group_ref, row_tile_ref, action_ref, a_ref, b_ref, *refs, accumulates: bool):
    """The program of a grid step. `refs`: both scales in FP8, the accumulator if there is one, a group's product."""
    *scales, out_ref = refs
    accumulator_ref = scales.pop() if accumulates else None
    action = action_ref[pl.program_id(2)]

    @pl.when(action == _ZERO)
    def _():
        out_ref[...] = jnp.zeros_like(out_ref) if accumulator_ref is None else accumulator_ref[...]

    @pl.when((action == _START) | (action == _ADD))
    def _():
        if scales:
            partial = _dot(a_ref[...].astype(jnp.bfloat16), b_ref[...].astype(jnp.bfloat16), (1, 1))
            rows = jnp.broadcast_to(scales[0][0], (LANES, partial.shape[0])).T[:, :1]
            partial = partial * rows * scales[1][0]
        else:
            partial = _dot(a_ref[...], b_ref[...], (0, 0))

        @pl.when(action == _START)
        def _():
            out_ref[0] = partial if accumulator_ref is None else accumulator_ref[0] + partial

        @pl.when(action == _ADD)
        def _():
            out_ref[0] += partial


def _dot(a, b, contracted: tuple[int, int]):
    dimensions = (((contracted[0],), (contracted[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _column(scales: Float[Array, "128 blocks"], index) -> Float[Array, "128 1"]:
    """Returns one column of the scales, by a masked sum: lanes cannot be indexed by a number known at run time only."""
    lane = lax.broadcasted_iota(jnp.int32, scales.shape, 1)
    return jnp.sum(jnp.where(lane == index, scales, 0), axis=1, keepdims=True)
