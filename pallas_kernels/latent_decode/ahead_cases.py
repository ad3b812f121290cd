"""Lists what of this operation is compiled ahead: V3's widths, few and many heads, small and large pages, FP8."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.compile_ahead import Case
from pallas_kernels.latent_decode.operands import Operands


def hopper() -> list[Case]:
    from pallas_kernels.latent_decode import hopper

    return _cases(hopper.decode)


def tpu() -> list[Case]:
    from pallas_kernels.latent_decode import tpu

    return _cases(tpu.decode)


def _cases(decode) -> list[Case]:
    def case(tokens: int, heads: int, page: int, *, fp8: bool = False) -> Case:
        def shape(*sizes: int, dtype=jnp.bfloat16) -> Any:
            return jax.ShapeDtypeStruct(sizes, dtype)

        batch, pages = 16, 65536 // page
        arguments = Operands(
            shape(batch, tokens, heads, 512),
            shape(batch, tokens, heads, 64),
            shape(pages, page, 512, dtype=jnp.float8_e4m3fn if fp8 else jnp.bfloat16),
            shape(pages, page, 64),
            shape(batch, 8192 // page, dtype=jnp.int32),
            shape(batch, tokens, dtype=jnp.int32),
            shape(pages, page, dtype=jnp.float32) if fp8 else None,
        )
        name = f"{tokens} tokens, {heads} heads, pages of {page}{', FP8' * fp8}"
        return Case(name, functools.partial(decode, scale=0.1), (arguments,))

    return [case(1, 128, 64), case(2, 16, 16), case(1, 128, 64, fp8=True)]
