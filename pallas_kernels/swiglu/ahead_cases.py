"""Lists what of this operation is compiled ahead: the width of V3's experts, whole tiles of rows and ragged ones."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.compile_ahead import Case
from pallas_kernels.quantize.quantized import E4M3, Quantized, scales_shape

_WIDTH = 2048


def hopper() -> list[Case]:
    from pallas_kernels.swiglu import hopper as kernel

    return _cases(kernel)


def tpu() -> list[Case]:
    from pallas_kernels.swiglu import tpu as kernel

    return _cases(kernel)


def _cases(kernel) -> list[Case]:
    cases = []
    for rows in (4096, 1000):
        shape = (rows, 2 * _WIDTH)
        values = jax.ShapeDtypeStruct(shape, E4M3)
        scales = jax.ShapeDtypeStruct(scales_shape(shape, "1x128"), jnp.float32)
        kept = Quantized(values, scales, "1x128")  # pyright: ignore[reportArgumentType]
        gradient = jax.ShapeDtypeStruct((rows, _WIDTH), jnp.bfloat16)
        forward = functools.partial(kernel.quantize_swiglu, power_of_two_scales=False)
        backward = functools.partial(kernel.swiglu_gradient, power_of_two_scales=False)
        variant = rows % 128 > 0
        cases += [
            Case(f"forward, {rows} rows", forward, (jax.ShapeDtypeStruct(shape, jnp.bfloat16),), variant),
            Case(f"backward, {rows} rows", backward, (kept, gradient), variant),
        ]
    return cases
