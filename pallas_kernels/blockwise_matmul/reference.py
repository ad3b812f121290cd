"""The FP8 product in plain jax.numpy.

The definition (report, section 3.3.2), block l of K being the l-th PROMOTION_INTERVAL columns of both operands:

    C[i, j] = sum over l of  scale_a[i, l] * scale_b[j, l] * (sum over k in block l of a[i, k] * b[j, k])

A kernel has the inner sum in the tensor core's accumulator and the outer one in float32 registers: the promotion. In
float32 products of e4m3 values are exact, so here the scales are multiplied in first and the sum is one product: equal
to the definition up to the rounding of float32, and as fast as any product.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.quantize.quantized import Quantized
from pallas_kernels.quantize.reference import dequantize


def matmul(
    a: Quantized, b: Quantized, accumulator: Float[Array, "M N"] | None, out_dtype: DTypeLike
) -> Float[Array, "M N"]:
    """Returns A·Bᵀ (+ accumulator), summed in float32."""
    left, right = (dequantize(q, jnp.dtype(jnp.float32)) for q in (a, b))
    product = lax.dot_general(left, right, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST)
    return (product if accumulator is None else accumulator + product).astype(out_dtype)
