"""SwiGLU with the quantization around it on TPUs, in Mosaic TPU.

The gates and the factors of a tile are two blocks of one array. The last axis of the grid visits them in turn, since a
step can write one block of an array; what it reads stays in VMEM for both.
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
from pallas_kernels.quantize.tpu import quantize_columns, quantize_tile_rows, scales_struct
from pallas_kernels.swiglu.reference import activation, gradients

_MOST_TILES = 4  # of 128 columns in a step

Interpret = pltpu.InterpretParams | None


class _Blocks:
    """The grid of a call and the blocks of its arrays: rows, columns of one half, and the half."""

    def __init__(self, rows: int, width: int):
        tiles = width // TILE
        self.width = TILE * math.gcd(tiles, _MOST_TILES)
        self.steps = width // self.width
        self.grid = (pl.cdiv(rows, TILE), self.steps, 2)

    def values(self, half: int | None = 0) -> pl.BlockSpec:
        """Returns the block of values in one half of the columns; None for the half that the grid is in."""
        return pl.BlockSpec((TILE, self.width), lambda i, j, p: (i, j + (p if half is None else half) * self.steps))

    def scales(self, half: int | None = 0) -> pl.BlockSpec:
        """Returns the block of the scales of such values, stored as [tiles along the columns, 1, rows]."""
        shape = (self.width // TILE, 1, TILE)
        return pl.BlockSpec(shape, lambda i, j, p: (j + (p if half is None else half) * self.steps, 0, i))


@once_a_program("power_of_two_scales")
def quantize_swiglu(
    gate_up: Float[Array, "M 2*W"], power_of_two_scales: bool, *, interpret: Interpret = None
) -> tuple[Quantized, Quantized]:
    """Computes `reference.quantize_swiglu`."""
    rows, both = gate_up.shape
    blocks = _Blocks(rows, both // 2)
    hidden, hidden_scales, kept, kept_scales = pl.pallas_call(
        functools.partial(_forward_kernel, power_of_two=power_of_two_scales),
        grid=blocks.grid,
        in_specs=[blocks.values(0), blocks.values(1)],
        out_specs=[blocks.values(), blocks.scales(), blocks.values(None), blocks.scales(None)],
        out_shape=[
            jax.ShapeDtypeStruct((rows, both // 2), E4M3),
            scales_struct(both // 2, rows),
            jax.ShapeDtypeStruct((rows, both), E4M3),
            scales_struct(both, rows),
        ],
        interpret=interpret or False,
        name="quantize_swiglu",
    )(gate_up, gate_up)
    return Quantized(hidden, hidden_scales[:, 0].T, "1x128"), Quantized(kept, kept_scales[:, 0].T, "1x128")


@once_a_program("power_of_two_scales")
def swiglu_gradient(
    gate_up: Quantized, gradient: Float[Array, "M W"], power_of_two_scales: bool, *, interpret: Interpret = None
) -> tuple[Float[Array, "M 2*W"], Quantized]:
    """Computes `reference.swiglu_gradient`."""
    rows, width = gradient.shape
    blocks = _Blocks(rows, width)
    out_specs: list[Any] = [
        blocks.values(None),
        pl.BlockSpec((blocks.width, TILE), lambda i, j, p: (j, i)),
        pl.BlockSpec((1, 1, blocks.width), lambda i, j, p: (i, 0, j)),
    ]
    scales = gate_up.scales.T[:, None]
    bars, columns, column_scales = pl.pallas_call(
        functools.partial(_gradient_kernel, rows=rows, power_of_two=power_of_two_scales),
        grid=blocks.grid,
        in_specs=[blocks.values(0), blocks.values(1), blocks.scales(0), blocks.scales(1), blocks.values(0)],
        out_specs=out_specs,
        out_shape=[
            jax.ShapeDtypeStruct((rows, 2 * width), gradient.dtype),
            jax.ShapeDtypeStruct((width, rows), E4M3),
            scales_struct(rows, width),
        ],
        interpret=interpret or False,
        name="swiglu_gradient",
    )(gate_up.values, gate_up.values, scales, scales, gradient)
    return bars, Quantized(columns, column_scales[:, 0].T, "1x128")


def _forward_kernel(gate_ref, up_ref, hidden_ref, hidden_scales_ref, kept_ref, kept_scales_ref, *, power_of_two):
    first = pl.program_id(2) == 0
    for t in range(gate_ref.shape[1] // TILE):
        at = pl.ds(t * TILE, TILE)
        gate, up = (ref[:, at].astype(jnp.float32) for ref in (gate_ref, up_ref))
        quantize_tile_rows(jnp.where(first, gate, up), kept_ref.at[:, at], kept_scales_ref.at[t], False)

        @pl.when(first)
        def _(gate=gate, up=up, at=at, t=t):
            hidden = activation(gate, up).astype(gate_ref.dtype).astype(jnp.float32)
            quantize_tile_rows(hidden, hidden_ref.at[:, at], hidden_scales_ref.at[t], power_of_two)


def _gradient_kernel(
    gate_ref, up_ref, gate_scales_ref, up_scales_ref, gradient_ref, bars_ref, columns_ref, column_scales_ref,
    *, rows, power_of_two,
):  # fmt: skip
    first = pl.program_id(2) == 0
    row = lax.broadcasted_iota(jnp.int32, (TILE, TILE), 0) + pl.program_id(0) * TILE
    for t in range(gate_ref.shape[1] // TILE):
        at = pl.ds(t * TILE, TILE)
        gate, up = (
            values[:, at].astype(jnp.float32) * jnp.broadcast_to(scales[t], (TILE, TILE)).T
            for values, scales in ((gate_ref, gate_scales_ref), (up_ref, up_scales_ref))
        )
        of_gate, of_up = gradients(gate, up, gradient_ref[:, at].astype(jnp.float32))
        bars_ref[:, at] = jnp.where(first, of_gate, of_up).astype(bars_ref.dtype)

        @pl.when(first)
        def _(gate=gate, up=up, at=at):
            hidden = activation(gate, up).astype(bars_ref.dtype).astype(jnp.float32)
            hidden = jnp.where(row < rows, hidden, 0)  # VMEM is not initialized past the last row
            quantize_columns(hidden, columns_ref.at[at], column_scales_ref.at[0, :, at], power_of_two)
