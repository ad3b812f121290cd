"""Checks that tilings count all of the shared memory that the launches ask for."""

from __future__ import annotations

import functools
import math

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import pytest

from pallas_kernels.blockwise_matmul import hopper as blockwise
from pallas_kernels.blockwise_matmul import tuning
from pallas_kernels.grouped_matmul import hopper as grouped
from pallas_kernels.grouped_matmul import tiling as grouped_tilings
from pallas_kernels.hopper_launch import hopper_target
from pallas_kernels.quantize.quantized import E4M3, Quantized, scales_shape

BARRIERS = 1024  # bytes, at least, that every tiling counts for barriers and alignment


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch):
    """Returns a function that traces a call and gives the bytes of the buffers that its kernel asks for."""

    class Stop(Exception):
        pass

    def kernel(*_, scratch_types, **__):
        buffers = [entry for entry in scratch_types.values() if hasattr(entry, "dtype")]
        raise Stop(sum(math.prod(buffer.shape) * jnp.dtype(buffer.dtype).itemsize for buffer in buffers))

    def bytes_of(call, *operands) -> int:
        monkeypatch.setattr(plgpu, "kernel", kernel)
        with hopper_target(), pytest.raises(Stop) as stopped:
            jax.eval_shape(call, *operands)
        return stopped.value.args[0]

    return bytes_of


def quantized(shape: tuple[int, ...], tile) -> Quantized:
    scales = jax.ShapeDtypeStruct(scales_shape(shape, tile), jnp.float32)
    return Quantized(jax.ShapeDtypeStruct(shape, E4M3), scales, tile)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("out_dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("by_column", [True, False])
def test_blockwise_tilings_count_operands_scales_and_results(asked, out_dtype, by_column):
    """Scales of A and, where B has one per column, of B: one number per row or column and stage."""
    width = jnp.dtype(out_dtype).itemsize
    operands = quantized((512, 4096), "1x128"), quantized((512, 4096), "1x128" if by_column else "128x128")
    for tiling in tuning.tilings(width, by_column)[::5]:  # all parts of K, widths and heights among them
        call = functools.partial(blockwise.matmul, accumulator=None, out_dtype=out_dtype, tiling=tiling)
        needed = asked(lambda a, b, call=call: call(a, b), *operands)
        counted = tiling.shared_memory_bytes(width if tiling.splits == 1 else 4)  # parts of K are summed in float32
        uncounted = 0 if by_column else tiling.stages * 4 * tiling.tile_n
        assert needed + BARRIERS <= counted <= needed + 2 * BARRIERS + uncounted


@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize("form", ["rows", "depth"])
def test_grouped_tilings_count_operands_scales_and_results(asked, form, fp8):
    sizes = jax.ShapeDtypeStruct((2,), jnp.int32)
    for tiling in grouped_tilings.candidates(form, fp8, 4):
        plain = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)  # noqa: E731
        if form == "rows":
            operands = (quantized((256, 512), "1x128"), quantized((2, 512, 512), "128x128"))
            operands = operands if fp8 else (plain(256, 512), plain(2, 512, 512))
            call = functools.partial(grouped.rows_by_weights, out_dtype=jnp.float32, tiling=tiling)
        else:
            operands = (quantized((512, 256), "1x128"),) * 2 if fp8 else (plain(256, 512),) * 2
            call = functools.partial(grouped.rows_by_rows, tiling=tiling)
        needed = asked(lambda a, b, sizes, call=call: call(a, b, sizes), *operands, sizes)
        counted = tiling.shared_memory_bytes(fp8, 4)
        assert needed + BARRIERS <= counted <= needed + 2 * BARRIERS + tiling.stages * 4 * tiling.tile_n
