"""Lists what of this operation is compiled ahead: V3's widths, few and many heads, small and large pages."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.compile_ahead import Case


def hopper() -> list[Case]:
    from pallas_kernels.latent_decode import hopper

    return _cases(hopper.decode)


def tpu() -> list[Case]:
    from pallas_kernels.latent_decode import tpu

    return _cases(tpu.decode)


def _cases(decode) -> list[Case]:
    def case(tokens: int, heads: int, page: int) -> Case:
        def shape(*sizes: int, dtype=jnp.bfloat16):
            return jax.ShapeDtypeStruct(sizes, dtype)

        batch, pages = 16, 65536 // page
        arguments = (
            shape(batch, tokens, heads, 512),
            shape(batch, tokens, heads, 64),
            shape(pages, page, 512),
            shape(pages, page, 64),
            shape(batch, 8192 // page, dtype=jnp.int32),
            shape(batch, tokens, dtype=jnp.int32),
        )
        name = f"{tokens} tokens, {heads} heads, pages of {page}"
        return Case(name, functools.partial(decode, scale=0.1), arguments)

    return [case(1, 128, 64), case(2, 16, 16)]
