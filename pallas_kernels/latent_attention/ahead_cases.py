"""Lists what of this operation is compiled ahead: the widths of V3, keys without a shared part, ragged lengths."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.compile_ahead import Case
from pallas_kernels.latent_attention.operands import OfResult, Operands


def _operands(length: int, heads: int, own: int, shared: int, value: int, segments: bool):
    def shape(*sizes: int, dtype=jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct((1, length, *sizes), dtype)

    return Operands(
        shape(heads, own + shared),
        shape(heads, own),
        shape(heads, value),
        shape(shared) if shared else None,
        shape(dtype=jnp.int32) if segments else None,
    )


def _cases(forward, backward, name: str, *sizes, causal: bool = True, variant: bool = False) -> list[Case]:
    inputs = _operands(*sizes)
    batch, length, heads, _ = inputs.q.shape
    statistic: Any = jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)
    result = OfResult(inputs.v, statistic, statistic)
    settings = {"scale": 0.1, "causal": causal}
    return [
        Case(f"forward, {name}", functools.partial(forward, **settings), (inputs,), variant),
        Case(f"backward, {name}", functools.partial(backward, **settings), (inputs, result), variant),
    ]


def hopper() -> list[Case]:
    from pallas_kernels.latent_attention import hopper_backward, hopper_forward

    cases = functools.partial(_cases, hopper_forward.forward, hopper_backward.backward)
    return [
        *cases("128 + 64 and 128 wide", 4096, 128, 128, 64, 128, False, variant=True),
        *cases("128 + 64 and 128 wide, segments", 4096, 128, 128, 64, 128, True),
        *cases("192 and 128 wide, all pairs", 4096, 16, 192, 0, 128, False, causal=False, variant=True),
        *cases("64 and 64 wide, ragged, segments", 1001, 16, 64, 0, 64, True, variant=True),
        *cases("48 + 16 and 80 wide, ragged", 1001, 16, 48, 16, 80, False),
    ]


def tpu() -> list[Case]:
    from pallas_kernels.latent_attention import tpu_backward, tpu_forward

    cases = functools.partial(_cases, tpu_forward.forward, tpu_backward.backward)
    return [
        *cases("128 + 64 and 128 wide, segments", 4096, 16, 128, 64, 128, True),
        *cases("192 and 128 wide, all pairs", 4096, 16, 192, 0, 128, False, causal=False, variant=True),
        *cases("48 + 16 and 80 wide, ragged", 1001, 16, 48, 16, 80, False),
    ]
