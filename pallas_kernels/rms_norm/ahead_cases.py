"""Lists what of this operation is compiled ahead: hidden states and query latents of V3, rows whole and ragged."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.compile_ahead import Case


def hopper() -> list[Case]:
    from pallas_kernels.rms_norm import hopper as kernel

    return _cases(kernel)


def tpu() -> list[Case]:
    from pallas_kernels.rms_norm import tpu as kernel

    return _cases(kernel)


def _cases(kernel) -> list[Case]:
    cases = []
    for rows, width in ((4096, 7168), (1000, 1536)):
        x = jax.ShapeDtypeStruct((rows, width), jnp.bfloat16)
        reciprocal, weight = (jax.ShapeDtypeStruct((size,), jnp.float32) for size in (rows, width))
        alone, both = (
            functools.partial(kernel.quantize_scaled, power_of_two_scales=False, with_rows=with_rows)
            for with_rows in (False, True)
        )
        size, variant = f"{rows} x {width}", rows % 128 > 0
        cases += [
            Case(f"forward, {size}", alone, (x, reciprocal, weight), variant),
            Case(f"forward with rows, {size}", both, (x, reciprocal, weight), True),
            Case(f"backward, {size}", kernel.rms_norm_gradient, (x, reciprocal, weight, x, None), True),
            Case(f"backward with a sum, {size}", kernel.rms_norm_gradient, (x, reciprocal, weight, x, x), variant),
        ]
    return cases
