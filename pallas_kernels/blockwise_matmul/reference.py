"""The FP8 product in plain jax.numpy.

`matmul_by_blocks` is the definition (report, section 3.3.2): exact products of e4m3 values are summed over 128 of K,
the partial sum is promoted to float32 and multiplied by both scales there. `matmul` is the same sum with the scales
multiplied in first, one float32 product: equal up to the rounding of float32, and as fast as any product.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.quantize.quantized import Quantized
from pallas_kernels.quantize.reference import dequantize

BLOCK_K = 128


def matmul(a: Quantized, b: Quantized, accumulator: Float[Array, "M N"] | None) -> Float[Array, "M N"]:
    """A·Bᵀ (+ accumulator), float32."""
    float32 = jnp.dtype(jnp.float32)
    return _add(_contract(dequantize(a, float32), dequantize(b, float32)), accumulator)


def matmul_by_blocks(a: Quantized, b: Quantized, accumulator: Float[Array, "M N"] | None) -> Float[Array, "M N"]:
    """A·Bᵀ (+ accumulator), float32, block by block of K as the hardware does it."""
    total = jnp.zeros((a.shape[0], b.shape[0]), jnp.float32)
    for block in range(a.scales.shape[1]):
        k = slice(block * BLOCK_K, (block + 1) * BLOCK_K)
        partial = _contract(a.values[:, k].astype(jnp.float32), b.values[:, k].astype(jnp.float32))
        total += partial * a.scales[:, block, None] * _row_scales(b)[None, :, block]
    return _add(total, accumulator)


def _row_scales(b: Quantized) -> Float[Array, "N K/128"]:
    return b.scales if b.tile == "1x128" else jnp.repeat(b.scales, BLOCK_K, axis=0)[: b.shape[0]]


def _contract(a: Float[Array, "M K"], b: Float[Array, "N K"]) -> Float[Array, "M N"]:
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST)


def _add(product: Float[Array, "M N"], accumulator: Float[Array, "M N"] | None) -> Float[Array, "M N"]:
    return product if accumulator is None else accumulator + product
