"""The FP8 product on TPUs, in Mosaic TPU.

Neither v5p nor v6e multiplies FP8. The operands are e4m3 in HBM and VMEM, which halves their traffic, and are widened
to bfloat16, exactly, before the matrix unit. It sums in float32, so promotion is only scaling: the partial sum of each
128 of K is multiplied by its row's and its column's scale.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.device import LANES, once_a_program
from pallas_kernels.quantize.quantized import PROMOTION_INTERVAL, TILE, Quantized

_MAX_K_BLOCKS = 8  # promotion intervals in one grid step
_TILE_M = 512
_TILE_N = 512


@once_a_program("out_dtype")
def matmul(
    a: Quantized,
    b: Quantized,
    accumulator: Float[Array, "M N"] | None,
    out_dtype: DTypeLike,
    *,
    interpret: pltpu.InterpretParams | None = None,
) -> Float[Array, "M N"]:
    """Returns A·Bᵀ (+ accumulator); operands as in `blockwise_matmul`. K is padded to a multiple of 128."""
    (m, k), n = a.shape, b.shape[0]
    blocks = pl.cdiv(k, PROMOTION_INTERVAL)
    step = math.gcd(blocks, _MAX_K_BLOCKS)
    a_values, b_values = (
        jnp.pad(q.values, ((0, 0), (0, -k % PROMOTION_INTERVAL))) if k % PROMOTION_INTERVAL else q.values
        for q in (a, b)
    )
    # One scale per column of the product and block of K, with N along the lanes as in the product.
    b_scales = (b.scales if b.tile == "1x128" else jnp.repeat(b.scales, TILE, axis=0)[:n]).T[:, None]
    tile_m, tile_n = min(_TILE_M, m + -m % 32), min(_TILE_N, n + -n % LANES)
    operands = [a_values, a.scales, b_values, b_scales]
    in_specs = [
        pl.BlockSpec((tile_m, step * PROMOTION_INTERVAL), lambda i, j, s: (i, s)),
        pl.BlockSpec((tile_m, blocks), lambda i, j, s: (i, 0)),
        pl.BlockSpec((tile_n, step * PROMOTION_INTERVAL), lambda i, j, s: (j, s)),
        pl.BlockSpec((step, 1, tile_n), lambda i, j, s: (s, 0, j)),
    ]
    if accumulator is not None:
        operands.append(accumulator)
        in_specs.append(pl.BlockSpec((tile_m, tile_n), lambda i, j, s: (i, j)))
    return pl.pallas_call(
        functools.partial(_kernel, step=step, has_accumulator=accumulator is not None),
        grid=(pl.cdiv(m, tile_m), pl.cdiv(n, tile_n), blocks // step),
        in_specs=in_specs,
        out_specs=pl.BlockSpec((tile_m, tile_n), lambda i, j, s: (i, j)),
        out_shape=jax.ShapeDtypeStruct((m, n), out_dtype),
        scratch_shapes=[pltpu.VMEM((tile_m, tile_n), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret or False,
        name="blockwise_matmul",
    )(*operands)


def _kernel(a_ref, a_scales_ref, b_ref, b_scales_ref, *refs, step: int, has_accumulator: bool):
    accumulator_ref = refs[0] if has_accumulator else None
    out_ref, total_ref = refs[-2:]
    first_block = pl.program_id(2) * step

    @pl.when(first_block == 0)
    def _():
        total_ref[...] = jnp.zeros_like(total_ref) if accumulator_ref is None else accumulator_ref[...]

    for s in range(step):
        at = pl.ds(s * PROMOTION_INTERVAL, PROMOTION_INTERVAL)
        partial = lax.dot_general(
            a_ref[:, at].astype(jnp.bfloat16),
            b_ref[:, at].astype(jnp.bfloat16),
            (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        total_ref[...] += partial * _column(a_scales_ref, first_block + s) * b_scales_ref[s]

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        out_ref[...] = total_ref[...].astype(out_ref.dtype)


def _column(scales_ref, index) -> Float[Array, "tile_m 1"]:
    """Returns one column of the scales, by a masked sum: lanes cannot be indexed by a number known at run time only."""
    scales = scales_ref[...]
    lane = lax.broadcasted_iota(jnp.int32, scales.shape, 1)
    return jnp.sum(jnp.where(lane == index, scales, 0), axis=1, keepdims=True)
