"""Lists what of this operation is compiled ahead: the widths of V3, keys without a shared part, ragged lengths."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.compile_ahead import Case


def _operands(length: int, heads: int, own: int, shared: int, value: int, segments: bool):
    def shape(*sizes: int, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct((1, length, *sizes), dtype)

    return (
        shape(heads, own + shared),
        shape(heads, own),
        shape(heads, value),
        shape(shared) if shared else None,
        shape(dtype=jnp.int32) if segments else None,
    )


def hopper() -> list[Case]:
    from pallas_kernels.latent_attention import hopper as kernel

    def case(name: str, *sizes, causal: bool = True) -> Case:
        function = functools.partial(kernel.forward, scale=0.1, causal=causal)
        return Case(f"forward, {name}", function, _operands(*sizes))

    return [
        case("128 + 64 and 128 wide", 4096, 128, 128, 64, 128, False),
        case("128 + 64 and 128 wide, segments", 4096, 128, 128, 64, 128, True),
        case("192 and 128 wide, all pairs", 4096, 16, 192, 0, 128, False, causal=False),
        case("64 and 64 wide, ragged, segments", 1001, 16, 64, 0, 64, True),
        case("48 + 16 and 80 wide, ragged", 1001, 16, 48, 16, 80, False),
    ]
