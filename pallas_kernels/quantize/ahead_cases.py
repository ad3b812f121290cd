"""What is compiled ahead of this operation: every tile and both input dtypes, at sizes of V3's own activations."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.compile_ahead import Case
from pallas_kernels.quantize.quantized import E4M3, Quantized

_SHAPE = (4096, 7168)


def hopper() -> list[Case]:
    from pallas_kernels.quantize import hopper as kernel

    return _cases(kernel)


def tpu() -> list[Case]:
    from pallas_kernels.quantize import tpu as kernel

    return _cases(kernel)


def _cases(kernel) -> list[Case]:
    cases = []
    for dtype in (jnp.bfloat16, jnp.float32):
        x = jax.ShapeDtypeStruct(_SHAPE, dtype)
        name = jnp.dtype(dtype).name
        for tile in ("1x128", "128x128", "128x1"):
            function = functools.partial(kernel.quantize, tile=tile, power_of_two_scales=False)
            cases.append(Case(f"{tile}, {name}", function, (x,)))
        both = functools.partial(kernel.quantize_both, power_of_two_scales=True)
        cases.append(Case(f"both orientations, powers of two, {name}", both, (x,)))
    q = Quantized(
        jax.ShapeDtypeStruct(_SHAPE, E4M3),  # pyright: ignore[reportArgumentType]
        jax.ShapeDtypeStruct((_SHAPE[0], _SHAPE[1] // 128), jnp.float32),  # pyright: ignore[reportArgumentType]
        "1x128",
    )
    function = functools.partial(kernel.requantize_transposed, power_of_two_scales=True)
    return [*cases, Case("requantised transposed", function, (q,))]
