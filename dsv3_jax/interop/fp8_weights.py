"""Blocks of 128 x 128 e4m3 values with one scale each: to plain numbers and back (report section 3.3.2).

Works on host arrays piece by piece while a checkpoint streams through; `pallas_kernels.quantize` is the same
arithmetic on devices. A stored scale (`weight_scale_inv`) is the multiplier: weight = value * scale.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
from jaxtyping import Float, Float32

from dsv3_jax.interop.tensor_names import BLOCK

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
_LARGEST = np.float32(448.0)
_SMALLEST_AMAX = np.float32(1e-4)
_VALUE_OF_BYTE = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)


def dequantise(
    values: Float[np.ndarray, "out in"], scales: Float32[np.ndarray, "out_blocks in_blocks"]
) -> Float32[np.ndarray, "out in"]:
    """values * scales in float32; the first row and column begin a block, the last blocks may be ragged."""
    wide = np.empty(values.shape, np.float32)
    dequantise_into(values, scales, wide)
    return wide


def dequantise_into(
    values: Float[np.ndarray, "out in"],
    scales: Float32[np.ndarray, "out_blocks in_blocks"],
    target: Float[np.ndarray, "out in"],
) -> None:
    """The same, rounded once to the dtype of `target`, whose rows are contiguous.

    A block has one scale and a byte 256 values, so each row of blocks is read off a table of all their products: a
    third less work than widening, scaling and rounding every weight.
    """
    columns = values.shape[1]
    codes = values.view(np.uint8)
    table_of = np.repeat(np.arange(scales.shape[1], dtype=np.uint32) * 256, BLOCK)[:columns]
    places = np.empty((BLOCK, columns), np.uint32)
    for first, factors in zip(range(0, len(values), BLOCK), scales, strict=True):
        tables = (_VALUE_OF_BYTE * factors[:, None]).astype(target.dtype).reshape(-1)
        rows = codes[first : first + BLOCK]
        np.add(rows, table_of, out=places[: len(rows)])
        # Every place is in the table; "clip" takes without a copy.
        np.take(tables, places[: len(rows)], out=target[first : first + BLOCK], mode="clip")


def quantise(
    weights: Float32[np.ndarray, "out in"], *, power_of_two_scales: bool = False
) -> tuple[Float[np.ndarray, "out in"], Float32[np.ndarray, "out_blocks in_blocks"]]:
    """e4m3 values and scales: scale = max(largest magnitude of the block, 1e-4) / 448, or the next power of two up."""
    rows, columns = weights.shape
    padded = np.pad(weights, ((0, -rows % BLOCK), (0, -columns % BLOCK)))
    blocks = padded.reshape(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)
    scales = np.maximum(np.abs(blocks).max(axis=(1, 3)), _SMALLEST_AMAX) / _LARGEST
    if power_of_two_scales:
        scales = _next_power_of_two(scales)
    return quantise_with(weights, scales), scales


def quantise_with(
    weights: Float32[np.ndarray, "out in"], scales: Float32[np.ndarray, "out_blocks in_blocks"]
) -> Float[np.ndarray, "out in"]:
    """e4m3 values under given scales. Of weights that were dequantised (even to bfloat16) they are the old values."""
    scaled = weights.astype(np.float32)
    _scale_blocks(scaled, np.float32(1) / scales)
    # The cast does not saturate: beyond 464 it gives NaN.
    return np.clip(scaled, -_LARGEST, _LARGEST).astype(E4M3)


def _scale_blocks(weights: Float32[np.ndarray, "out in"], factors: Float32[np.ndarray, "out_blocks in_blocks"]) -> None:
    """Multiplies each block by its factor, in place."""
    by_column = np.repeat(factors, BLOCK, axis=1)[:, : weights.shape[1]]
    whole = weights.shape[0] // BLOCK * BLOCK
    weights[:whole].reshape(-1, BLOCK, weights.shape[1])[...] *= by_column[: whole // BLOCK, None]
    weights[whole:] *= by_column[-1:]


def _next_power_of_two(scales: Float32[np.ndarray, "..."]) -> Float32[np.ndarray, "..."]:
    """2^ceil(log2 x), exact: carry into the exponent, drop the mantissa."""
    bits = scales.astype(np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFFFF)) & np.uint32(0x7F800000)).view(np.float32)
