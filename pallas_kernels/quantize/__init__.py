"""Fine-grained quantization to FP8 (report, sections 3.3.2 and 3.5.2)."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.device import Implementation, choose_implementation, kernel_module
from pallas_kernels.quantize import reference
from pallas_kernels.quantize.quantized import (
    PROMOTION_INTERVAL,
    TILE,
    Quantized,
    Tile,
    check_quantized,
    check_tile,
    not_differentiable,
    scales_shape,
)

__all__ = [
    "PROMOTION_INTERVAL",
    "TILE",
    "Quantized",
    "Tile",
    "dequantize",
    "quantize",
    "quantize_both",
    "requantize_transposed",
    "scales_shape",
]


@jax.named_scope("quantize")
def quantize(
    x: Float[Array, "... M K"],
    *,
    tile: Tile,
    power_of_two_scales: bool = False,
    implementation: Implementation | None = None,
) -> Quantized:
    """Returns `x` in e4m3 with one float32 scale per tile.

    `quantize/reference.py` has the definition and says what happens to zeros, infinities and NaN. Not differentiable:
    a product of quantized operands needs a gradient of its own (as `dsv3_jax.precision.fp8_layer` has).

    Args:
      x: float32 or bfloat16; leading dimensions are separate matrices (such as one per expert).
      tile: "1x128" along the last axis (activations), "128x128" (weights), "128x1" along the last but one.
      power_of_two_scales: round every scale up to a power of two (UE8M0), so that re-tiling is nearly exact.

    Raises:
      ValueError, TypeError: shapes or dtypes that do not fit, or an implementation that cannot run here.
    """
    _check_input(x)
    check_tile(tile)
    kernels = kernel_module("quantize", choose_implementation(implementation))

    def one_format(x):
        if kernels is reference:
            return reference.quantize(x, tile, power_of_two_scales)
        return _over_matrices(lambda matrix: kernels.quantize(matrix, tile, power_of_two_scales), x, tile)

    return not_differentiable(one_format)(x)


@jax.named_scope("quantize_both")
def quantize_both(
    x: Float[Array, "M K"],
    *,
    power_of_two_scales: bool = False,
    implementation: Implementation | None = None,
) -> tuple[Quantized, Quantized]:
    """Returns `x` quantized along its rows and along its columns; a kernel reads it once.

    Returns:
      `x` [M, K] in 1x128 tiles, and the transposed matrix [K, M] in 1x128 tiles, each over 128 rows of `x`. A weight
      gradient contracts over the rows, and the tensor cores need the contraction to be contiguous.
    """
    _check_input(x)
    if x.ndim != 2:
        raise ValueError(f"x must be [M, K], not of shape {x.shape}")
    kernels = kernel_module("quantize", choose_implementation(implementation))
    return not_differentiable(lambda x: kernels.quantize_both(x, power_of_two_scales))(x)


@jax.named_scope("requantize_transposed")
def requantize_transposed(
    q: Quantized, *, power_of_two_scales: bool = False, implementation: Implementation | None = None
) -> Quantized:
    """Returns the transpose [K, M] of `q` [M, K] in 1x128 tiles along M, as weight gradients need cached activations.

    `q` is dequantized, transposed and quantized again (section 3.5.2). With power-of-two scales on both sides only
    values below the new tile's smallest step change.
    """
    check_quantized("q", q, ndim=2)
    return kernel_module("quantize", choose_implementation(implementation)).requantize_transposed(
        q, power_of_two_scales
    )


@jax.named_scope("dequantize")
def dequantize(q: Quantized, dtype: DTypeLike = jnp.float32) -> Float[Array, "... M K"]:
    """Returns values times scales, computed in float32 and rounded to `dtype`."""
    check_quantized("q", q)
    return reference.dequantize(q, jnp.dtype(dtype))


def _over_matrices(function: Callable[[Array], Quantized], x: Float[Array, "... M K"], tile: Tile) -> Quantized:
    """Returns `function` applied to all matrices of `x`, stacked as one, each padded to whole tiles."""
    *batch, m, k = x.shape
    if not batch:
        return function(x)
    excess = 0 if tile == "1x128" else -m % TILE
    if excess:
        x = jnp.pad(x, [(0, 0)] * len(batch) + [(0, excess), (0, 0)])
    count = math.prod(batch)
    q = function(x.reshape(count * (m + excess), k))
    values = q.values.reshape(*batch, m + excess, k)[..., :m, :]
    return Quantized(values, q.scales.reshape(*batch, q.scales.shape[0] // count, q.scales.shape[1]), tile)


def _check_input(x: Array) -> None:
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise TypeError(f"x must be float32 or bfloat16, not {x.dtype}")
    if x.ndim < 2:
        raise ValueError(f"x must have at least 2 dimensions, not shape {x.shape}")
