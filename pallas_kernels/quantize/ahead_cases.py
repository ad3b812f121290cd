"""Lists what of this operation is compiled ahead: every tile and both input dtypes, at sizes of V3's activations."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.compile_ahead import Case
from pallas_kernels.quantize.quantized import E4M3, Quantized, scales_shape

_SHAPE = (4096, 7168)
# The width of V3's joint down-projection is a multiple of 64 only; the other shape is a multiple of no tile.
_RAGGED = {"4096 x 2112": (4096, 2112), "1000 x 333": (1000, 333)}


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
            cases.append(Case(f"{tile}, {name}", function, (x,), variant=dtype == jnp.float32))
        both = functools.partial(kernel.quantize_both, power_of_two_scales=True)
        cases.append(Case(f"both orientations, powers of two, {name}", both, (x,), variant=dtype == jnp.bfloat16))
    requantize = functools.partial(kernel.requantize_transposed, power_of_two_scales=True)
    cases.append(Case("requantised transposed", requantize, (_quantized(_SHAPE),)))
    for size, shape in _RAGGED.items():
        both = functools.partial(kernel.quantize_both, power_of_two_scales=False)
        blocks = functools.partial(kernel.quantize, tile="128x128", power_of_two_scales=False)
        odd = size == "1000 x 333"
        cases += [
            Case(f"both orientations, bfloat16, {size}", both, (jax.ShapeDtypeStruct(shape, jnp.bfloat16),), True),
            Case(f"128x128, float32, {size}", blocks, (jax.ShapeDtypeStruct(shape, jnp.float32),), True),
            Case(f"requantised transposed, {size}", requantize, (_quantized(shape),), variant=not odd),
        ]
    return cases


def _quantized(shape: tuple[int, int]) -> Quantized:
    values = jax.ShapeDtypeStruct(shape, E4M3)
    return Quantized(values, jax.ShapeDtypeStruct(scales_shape(shape, "1x128"), jnp.float32), "1x128")  # pyright: ignore
