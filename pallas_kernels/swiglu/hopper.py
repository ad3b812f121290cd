"""SwiGLU with the quantization around it on Hopper, in Mosaic GPU: a block per tile, as in `quantize/hopper.py`.

Tiles have 64 rows forward and 64 columns backward, so that two blocks or more fit a multiprocessor. The activation is
transposed through shared memory in 16 bits, which ldmatrix takes.
"""

from __future__ import annotations

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.device import once_a_program
from pallas_kernels.hopper_launch import pad_to
from pallas_kernels.quantize.hopper import HALF, cut, launch, quantize_rows, scales_struct, tile_smem
from pallas_kernels.quantize.quantized import E4M3, TILE, Quantized
from pallas_kernels.swiglu.reference import activation, gradients

_BY_ROW = plgpu.Layout.WGMMA_8BIT.reduce(1)


@once_a_program("power_of_two_scales")
def quantize_swiglu(
    gate_up: Float[Array, "M 2*W"], power_of_two_scales: bool, *, interpret: plgpu.InterpretGPUParams | None = None
) -> tuple[Quantized, Quantized]:
    """Computes `reference.quantize_swiglu`."""
    m, x = gate_up.shape[0], pad_to(gate_up, 8, 1)
    rows, both = x.shape
    width = both // 2

    def written():
        return tile_smem(E4M3, width, rows=HALF), plgpu.SMEM((HALF,), jnp.float32)

    hidden, hidden_scales, kept, kept_scales = launch(
        functools.partial(_forward_kernel, width=width, power_of_two=power_of_two_scales),
        "quantize_swiglu",
        (rows, width),
        [
            jax.ShapeDtypeStruct((rows, width), E4M3),
            scales_struct(width, rows),
            jax.ShapeDtypeStruct((rows, both), E4M3),
            scales_struct(both, rows),
        ],
        {
            "gate_smem": tile_smem(x.dtype, width, rows=HALF),
            "up_smem": tile_smem(x.dtype, width, rows=HALF),
            "hidden_smem": written(),
            "kept_gate_smem": written(),
            "kept_up_smem": written(),
            "arrived": plgpu.Barrier(num_arrivals=2),
        },
        interpret,
        tile=(HALF, TILE),
    )(x)
    return (
        Quantized(cut(hidden, m, width), cut(hidden_scales, width // TILE, m).T, "1x128"),
        Quantized(cut(kept, m, both), cut(kept_scales, both // TILE, m).T, "1x128"),
    )


@once_a_program("power_of_two_scales")
def swiglu_gradient(
    gate_up: Quantized,
    gradient: Float[Array, "M W"],
    power_of_two_scales: bool,
    *,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Float[Array, "M 2*W"], Quantized]:
    """Computes `reference.swiglu_gradient`."""
    m, width = gradient.shape
    values, gradient = pad_to(gate_up.values, 32, 1), pad_to(gradient, 32, 1)
    rows, dtype = gradient.shape[0], gradient.dtype
    bars, columns, column_scales = launch(
        functools.partial(_gradient_kernel, width=width, power_of_two=power_of_two_scales),
        "swiglu_gradient",
        (rows, width),
        [
            jax.ShapeDtypeStruct((rows, 2 * width), dtype),
            jax.ShapeDtypeStruct((width, rows), E4M3),
            scales_struct(rows, width),
        ],
        {
            "kept_smem": [tile_smem(E4M3, width, columns=HALF)] * 2,
            "scales_smem": [plgpu.SMEM((TILE,), jnp.float32)] * 2,
            "gradient_smem": tile_smem(dtype, width, columns=HALF),
            "bar_smem": [tile_smem(dtype, width, columns=HALF)] * 2,
            "hidden_smem": tile_smem(dtype, width, columns=HALF),
            "columns_smem": tile_smem(E4M3, rows, rows=HALF),
            "column_scales_smem": plgpu.SMEM((HALF,), jnp.float32),
            "arrived": plgpu.Barrier(num_arrivals=5),
        },
        interpret,
        tile=(TILE, HALF),
    )(values, pad_to(gate_up.scales.T, TILE), gradient)
    columns = Quantized(cut(columns, width, m), cut(column_scales, column_scales.shape[0], width).T, "1x128")
    return cut(bars, m, 2 * width), columns


def _forward_kernel(
    x, hidden, hidden_scales, kept, kept_scales,
    *, gate_smem, up_smem, hidden_smem, kept_gate_smem, kept_up_smem, arrived, tiles, width, power_of_two,
):  # fmt: skip
    @plgpu.nd_loop(tiles, collective_axes="blocks")
    def _(loop):
        i, j = loop.index
        rows, own, other = pl.ds(i * HALF, HALF), pl.ds(j * TILE, TILE), pl.ds(width + j * TILE, TILE)
        plgpu.copy_gmem_to_smem(x.at[rows, own], gate_smem, arrived)
        plgpu.copy_gmem_to_smem(x.at[rows, other], up_smem, arrived)
        plgpu.barrier_wait(arrived)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        wide = []
        for source, (values, scales) in ((gate_smem, kept_gate_smem), (up_smem, kept_up_smem)):
            part = plgpu.load(source, layout=plgpu.Layout.WGMMA_8BIT)
            quantize_rows(part, values, scales, False)
            wide.append(part.astype(jnp.float32))
        gate, up = wide
        values, scales = hidden_smem
        quantize_rows(activation(gate, up).astype(x.dtype), values, scales, power_of_two)
        plgpu.commit_smem()
        for (values, scales), target, target_scales, columns, row in (
            (hidden_smem, hidden, hidden_scales, own, j),
            (kept_gate_smem, kept, kept_scales, own, j),
            (kept_up_smem, kept, kept_scales, other, width // TILE + j),
        ):
            plgpu.copy_smem_to_gmem(values, target.at[rows, columns])
            plgpu.copy_smem_to_gmem(scales, target_scales.at[row, rows])

    plgpu.wait_smem_to_gmem(0)


def _gradient_kernel(
    kept, kept_scales, gradient, bars, columns, column_scales,
    *, kept_smem, scales_smem, gradient_smem, bar_smem, hidden_smem, columns_smem, column_scales_smem,
    arrived, tiles, width, power_of_two,
):  # fmt: skip
    @plgpu.nd_loop(tiles, collective_axes="blocks")
    def _(loop):
        i, j = loop.index
        rows = pl.ds(i * TILE, TILE)
        parts = [pl.ds(start + j * HALF, HALF) for start in (0, width)]
        for part, (start, columns_of_part) in enumerate(zip((0, width // TILE), parts, strict=True)):
            plgpu.copy_gmem_to_smem(kept.at[rows, columns_of_part], kept_smem[part], arrived)
            scales = kept_scales.at[start + lax.div(j, TILE // HALF), rows]
            plgpu.copy_gmem_to_smem(scales, scales_smem[part], arrived)
        plgpu.copy_gmem_to_smem(gradient.at[rows, parts[0]], gradient_smem, arrived)
        plgpu.barrier_wait(arrived)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for start in (0, HALF):
            half = pl.ds(start, HALF)

            def restored(part, half=half):
                values = plgpu.load(kept_smem[part].at[half], layout=plgpu.Layout.WGMMA_8BIT).astype(jnp.float32)
                scales = plgpu.load(scales_smem[part].at[half], layout=_BY_ROW)
                return values * lax.broadcast_in_dim(scales, values.shape, (0,))

            gate, up = restored(0), restored(1)
            hidden_smem[half] = activation(gate, up).astype(hidden_smem.dtype)
            own = plgpu.load(gradient_smem.at[half], layout=plgpu.Layout.WGMMA_8BIT).astype(jnp.float32)
            for target, bar in zip(bar_smem, gradients(gate, up, own), strict=True):
                target[half] = bar.astype(target.dtype)
        plgpu.commit_smem()
        transposed = plgpu.load(hidden_smem.transpose((1, 0)), layout=plgpu.Layout.WGMMA, optimized=False)
        quantize_rows(transposed, columns_smem, column_scales_smem, power_of_two)
        plgpu.commit_smem()
        for source, columns_of_part in zip(bar_smem, parts, strict=True):
            plgpu.copy_smem_to_gmem(source, bars.at[rows, columns_of_part])
        plgpu.copy_smem_to_gmem(columns_smem, columns.at[parts[0], rows])
        plgpu.copy_smem_to_gmem(column_scales_smem, column_scales.at[i, parts[0]])

    plgpu.wait_smem_to_gmem(0)
