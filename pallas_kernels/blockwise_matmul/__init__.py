"""The FP8 matrix product with fine-grained scales (report, section 3.3)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.device import Implementation, choose_implementation, kernel_module
from pallas_kernels.quantize.quantized import Quantized, check_quantized

__all__ = ["blockwise_matmul"]


@jax.named_scope("blockwise_matmul")
def blockwise_matmul(
    a: Quantized,
    b: Quantized,
    *,
    accumulator: Float[Array, "M N"] | None = None,
    out_dtype: DTypeLike = jnp.bfloat16,
    implementation: Implementation | None = None,
) -> Float[Array, "M N"]:
    """Returns A·Bᵀ (+ accumulator); after every 128 of K the sum is scaled and promoted to float32.

    K is the last axis of both operands. Not differentiable: see `pallas_kernels.quantize`.

    Args:
      a: [M, K] in 1x128 tiles.
      b: [N, K] in 128x128 blocks (forward and input gradient) or 1x128 tiles (weight gradient).
      accumulator: float32 [M, N], added to the product before it is rounded to `out_dtype`.
      out_dtype: bfloat16 or float32.

    Raises:
      ValueError, TypeError: shapes, tiles or dtypes that do not fit, or an implementation that cannot run here.
    """
    _check(a, b, accumulator, out_dtype)
    name = choose_implementation(implementation)
    return _product(a, b, accumulator, name, jnp.dtype(out_dtype))


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _product(a, b, accumulator, name, out_dtype):
    return kernel_module("blockwise_matmul", name).matmul(a, b, accumulator, out_dtype)


@_product.defjvp
def _refuse(name, out_dtype, primals, tangents):
    raise TypeError(
        "blockwise_matmul carries no gradient: give it one (jax.custom_vjp) or apply lax.stop_gradient first"
    )


def _check(a, b, accumulator, out_dtype) -> None:
    check_quantized("a", a, ndim=2)
    check_quantized("b", b, ndim=2)
    if a.tile != "1x128":
        raise ValueError(f"a must be in 1x128 tiles, not {a.tile}")
    if b.tile not in ("128x128", "1x128"):
        raise ValueError(f"b must be in 128x128 blocks or 1x128 tiles, not {b.tile}")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"b must be [N, {a.shape[1]}] as a is {a.shape}, not {b.shape}")
    if accumulator is not None:
        wanted = (a.shape[0], b.shape[0])
        if accumulator.shape != wanted:
            raise ValueError(f"accumulator must have shape {wanted}, not {accumulator.shape}")
        if accumulator.dtype != jnp.float32:
            raise TypeError(f"accumulator must be float32, not {accumulator.dtype}")
    if jnp.dtype(out_dtype) not in (jnp.bfloat16, jnp.float32):
        raise TypeError(f"out_dtype must be bfloat16 or float32, not {jnp.dtype(out_dtype)}")
