"""RMSNorm with the quantization behind it on TPUs, in Mosaic TPU.

Forward, a grid step has 128 rows and up to eight tiles of columns, as in `quantize/tpu.py`. Backward it has whole rows,
and adds its part of the weight's gradient to one block that all steps share.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.device import once_a_program
from pallas_kernels.quantize.quantized import E4M3, TILE, Quantized
from pallas_kernels.quantize.tpu import MAX_TILES, quantize_tile_rows, scales_struct

_ROWS = 32  # whole rows of a grid step of the gradient

Interpret = pltpu.InterpretParams | None


@once_a_program("power_of_two_scales", "with_rows")
def quantize_scaled(
    x: Float[Array, "M d"], reciprocal: Float[Array, " M"], weight: Float[Array, " d"],
    power_of_two_scales: bool, with_rows: bool, *, interpret: Interpret = None,
) -> tuple[Quantized, Float[Array, "M d"] | None]:  # fmt: skip
    """Computes `reference.quantize_scaled`, up to eight tiles of columns at a time."""
    m, d = x.shape
    width = TILE * math.gcd(d // TILE, MAX_TILES)
    tile = pl.BlockSpec((TILE, width), lambda i, j: (i, j))
    out_specs: list[Any] = [tile, pl.BlockSpec((width // TILE, 1, TILE), lambda i, j: (j, 0, i))]
    out_shape = [jax.ShapeDtypeStruct((m, d), E4M3), scales_struct(d, m)]
    values, scales, *normed = pl.pallas_call(
        functools.partial(_forward_kernel, power_of_two=power_of_two_scales),
        grid=(pl.cdiv(m, TILE), d // width),
        in_specs=[
            tile,
            pl.BlockSpec((1, TILE), lambda i, j: (0, i)),
            pl.BlockSpec((1, width), lambda i, j: (0, j)),
        ],
        out_specs=out_specs + [tile] * with_rows,
        out_shape=out_shape + [jax.ShapeDtypeStruct((m, d), x.dtype)] * with_rows,
        interpret=interpret or False,
        name="quantize_rms_norm",
    )(x, reciprocal[None], weight[None])
    return Quantized(values, scales[:, 0].T, "1x128"), normed[0] if with_rows else None


@once_a_program()
def rms_norm_gradient(
    x: Float[Array, "M d"], reciprocal: Float[Array, " M"], weight: Float[Array, " d"],
    gradient: Float[Array, "M d"], plus: Float[Array, "M d"] | None, *, interpret: Interpret = None,
) -> tuple[Float[Array, "M d"], Float[Array, " d"]]:  # fmt: skip
    """Computes `reference.rms_norm_gradient`, 32 rows at a time."""
    m, d = x.shape
    rows, whole = pl.BlockSpec((_ROWS, d), lambda i: (i, 0)), pl.BlockSpec((1, d), lambda i: (0, 0))
    others = [] if plus is None else [rows]
    x_bar, weight_bar = pl.pallas_call(
        functools.partial(_gradient_kernel, rows=m),
        grid=(pl.cdiv(m, _ROWS),),
        in_specs=[rows, pl.BlockSpec((_ROWS, 1), lambda i: (i, 0)), whole, rows, *others],
        out_specs=[rows, whole],
        out_shape=[jax.ShapeDtypeStruct((m, d), x.dtype), jax.ShapeDtypeStruct((1, d), jnp.float32)],
        interpret=interpret or False,
        name="rms_norm_gradient",
    )(x, reciprocal[:, None], weight[None], gradient, *([] if plus is None else [plus]))
    return x_bar, weight_bar[0]


def _forward_kernel(x_ref, reciprocal_ref, weight_ref, values_ref, scales_ref, *normed_refs, power_of_two):
    by_row = jnp.broadcast_to(reciprocal_ref[...], (TILE, TILE)).T
    for t in range(x_ref.shape[1] // TILE):
        at = pl.ds(t * TILE, TILE)
        normed = (x_ref[:, at].astype(jnp.float32) * by_row * weight_ref[:, at]).astype(x_ref.dtype)
        for ref in normed_refs:
            ref[:, at] = normed
        quantize_tile_rows(normed.astype(jnp.float32), values_ref.at[:, at], scales_ref.at[t], power_of_two)


def _gradient_kernel(x_ref, reciprocal_ref, weight_ref, gradient_ref, *refs, rows):
    *plus_refs, x_bar_ref, weight_bar_ref = refs
    by_row = reciprocal_ref[...]
    scaled, gradient = x_ref[...].astype(jnp.float32) * by_row, gradient_ref[...].astype(jnp.float32)
    weighted = gradient * weight_ref[...]
    mean = jnp.mean(weighted * scaled, axis=1, keepdims=True)
    x_bar = by_row * (weighted - scaled * mean)
    for ref in plus_refs:
        x_bar = x_bar + ref[...].astype(jnp.float32)
    x_bar_ref[...] = x_bar.astype(x_bar_ref.dtype)

    @pl.when(pl.program_id(0) == 0)
    def _():
        weight_bar_ref[...] = jnp.zeros_like(weight_bar_ref)

    row = lax.broadcasted_iota(jnp.int32, scaled.shape, 0) + pl.program_id(0) * _ROWS
    inside = jnp.where(row < rows, gradient * scaled, 0)  # VMEM is not initialized past the last row
    weight_bar_ref[...] += jnp.sum(inside, axis=0, keepdims=True)
