"""Quantises weights to blocks of 128 x 128 e4m3 values with one scale each, and back (report section 3.3.2).

These functions work on host arrays, one piece of a checkpoint at a time. `pallas_kernels.quantize` does the same
arithmetic on devices. A stored scale (`weight_scale_inv`) is the factor in weight = value * scale.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
from jaxtyping import Float, Float32

from dsv3_jax.interop.tensor_names import BLOCK

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
_LARGEST = np.float32(448.0)
_SMALLEST_SCALE = np.float32(2.0**-126)  # the smallest normal number: the scale of a block of zeros
_VALUE_OF_BYTE = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)


def dequantise(
    values: Float[np.ndarray, "out in"], scales: Float32[np.ndarray, "out_blocks in_blocks"]
) -> Float32[np.ndarray, "out in"]:
    """Returns values * scales in float32; the first row and column begin a block, the last blocks may be incomplete."""
    wide = np.empty(values.shape, np.float32)
    dequantise_into(values, scales, wide)
    return wide


def dequantise_into(
    values: Float[np.ndarray, "out in"],
    scales: Float32[np.ndarray, "out_blocks in_blocks"],
    target: Float[np.ndarray, "out in"],
) -> None:
    """Writes values * scales to `target`, whose rows are contiguous, rounded once to its dtype.

    A block has one scale and a byte has 256 values, so that all their products make a small table per block, in which
    each weight is looked up: a third less work than to widen, scale and round every weight.
    """
    columns = values.shape[1]
    codes = values.view(np.uint8)
    table_of = np.repeat(np.arange(scales.shape[1], dtype=np.uint32) * 256, BLOCK)[:columns]
    positions = np.empty((BLOCK, columns), np.uint32)
    for first, factors in zip(range(0, len(values), BLOCK), scales, strict=True):
        tables = (_VALUE_OF_BYTE * factors[:, None]).astype(target.dtype).reshape(-1)
        rows = codes[first : first + BLOCK]
        np.add(rows, table_of, out=positions[: len(rows)])
        # Every position is inside the tables; mode "clip" makes no copy.
        np.take(tables, positions[: len(rows)], out=target[first : first + BLOCK], mode="clip")


def quantise(
    weights: Float32[np.ndarray, "out in"], *, power_of_two_scales: bool = False
) -> tuple[Float[np.ndarray, "out in"], Float32[np.ndarray, "out_blocks in_blocks"]]:
    """Returns e4m3 values and scales.

    A scale is the largest magnitude of the block times 1 / 448, at least 2^-126, or with `power_of_two_scales` the next
    power of two.
    """
    rows, columns = weights.shape
    padded = np.pad(weights, ((0, -rows % BLOCK), (0, -columns % BLOCK)))
    blocks = padded.reshape(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)
    scales = np.maximum(np.abs(blocks).max(axis=(1, 3)) * (np.float32(1) / _LARGEST), _SMALLEST_SCALE)
    if power_of_two_scales:
        scales = _next_power_of_two(scales)
    return quantise_with(weights, scales), scales


def quantise_with(
    weights: Float32[np.ndarray, "out in"], scales: Float32[np.ndarray, "out_blocks in_blocks"]
) -> Float[np.ndarray, "out in"]:
    """Returns the e4m3 values of weights under given scales.

    Weights that were dequantised with these scales, even to bfloat16, give the values that they had before.
    """
    scaled = weights.astype(np.float32)
    _scale_blocks(scaled, np.float32(1) / scales)
    # The conversion does not saturate: beyond 464 it gives NaN.
    return np.clip(scaled, -_LARGEST, _LARGEST).astype(E4M3)


def _scale_blocks(weights: Float32[np.ndarray, "out in"], factors: Float32[np.ndarray, "out_blocks in_blocks"]) -> None:
    """Multiplies each block by its factor, in place."""
    by_column = np.repeat(factors, BLOCK, axis=1)[:, : weights.shape[1]]
    whole = weights.shape[0] // BLOCK * BLOCK
    weights[:whole].reshape(-1, BLOCK, weights.shape[1])[...] *= by_column[: whole // BLOCK, None]
    weights[whole:] *= by_column[-1:]


def _next_power_of_two(scales: Float32[np.ndarray, "..."]) -> Float32[np.ndarray, "..."]:
    """Returns 2^ceil(log2 x), exactly: a carry goes into the exponent, the mantissa is dropped."""
    bits = scales.astype(np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFFFF)) & np.uint32(0x7F800000)).view(np.float32)
