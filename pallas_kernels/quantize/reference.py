"""Quantization in plain jax.numpy: what the operations mean, and what runs on a CPU.

A tile with largest magnitude `amax` is stored as

    scale  = max(amax * (1 / 448), 2^-126)    (or the next power of two at or above that)
    values = e4m3(clip(x * (1 / scale), -448, 448)),   to nearest even

in float32, both reciprocals correctly rounded, so that every device gives the same bits.

A tile that holds an infinity or a NaN gets a NaN scale, so that all of it is NaN when used: an upstream error stays
visible instead of turning into a large finite number. Its values mean nothing. The clip is needed because JAX's cast
to e4m3 does not saturate: 465 becomes NaN. Values are multiplied by the reciprocal of the scale, as in kernels, so that
one division per tile is enough.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.quantize.quantized import E4M3, E4M3_MAX, MIN_SCALE, TILE_SHAPE, Quantized, Tile

_INFINITY_BITS = 0x7F800000


def quantize(x: Float[Array, "... M K"], tile: Tile, power_of_two_scales: bool) -> Quantized:
    blocks = _split(x.astype(jnp.float32), TILE_SHAPE[tile])
    scales = scales_from_magnitude(jnp.max(magnitude_bits(blocks), axis=(-3, -1)), power_of_two_scales)
    values = values_from_scaled(blocks * reciprocal(scales)[..., :, None, :, None])
    return Quantized(_join(values, x.shape), scales, tile)


def quantize_both(x: Float[Array, "M K"], power_of_two_scales: bool) -> tuple[Quantized, Quantized]:
    return quantize(x, "1x128", power_of_two_scales), quantize(x, "128x1", power_of_two_scales).mT


def requantize_transposed(q: Quantized, power_of_two_scales: bool) -> Quantized:
    return quantize(dequantize(q, jnp.dtype(jnp.float32)), "128x1", power_of_two_scales).mT


def dequantize(q: Quantized, dtype: jnp.dtype) -> Float[Array, "... M K"]:
    blocks = _split(q.values, TILE_SHAPE[q.tile]).astype(jnp.float32)
    return _join(blocks * q.scales[..., :, None, :, None], q.shape).astype(dtype)


def magnitude_bits(x: Float[Array, "..."]) -> Int[Array, "..."]:
    """Returns |x| as integers in the same order, with infinities above all numbers and NaN above infinities.

    The largest magnitude is taken of these, since a float maximum may drop a NaN (XLA does on a CPU).
    """
    return jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32) & 0x7FFFFFFF


def scales_from_magnitude(
    bits: Int[Array, "..."], power_of_two: bool, largest: float = E4M3_MAX
) -> Float[Array, "..."]:
    """Returns float32 scales from each tile's largest `magnitude_bits`; NaN where that is not finite.

    Args:
      largest: the largest number of the format that the tile is stored in.
    """
    amax = jax.lax.bitcast_convert_type(bits, jnp.float32)
    scales = jnp.maximum(amax * (1 / largest), MIN_SCALE)
    if power_of_two:
        scales = round_up_to_power_of_two(scales)
    return jnp.where(bits < _INFINITY_BITS, scales, jnp.nan)


def reciprocal(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns 1 / x of positive normal float32 numbers, correctly rounded.

    A GPU's own division may be off by two units in the last place. Its quotient r of the mantissa m is corrected by
    r (1 - m r); the factors are split into halves whose products are exact.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    m = jax.lax.bitcast_convert_type((bits & 0x7FFFFF) | 0x3F800000, jnp.float32)
    r = 1 / m
    m_high, r_high = _upper_half(m), _upper_half(r)
    m_low, r_low = m - m_high, r - r_high
    residual = ((1 - m_high * r_high) - m_high * r_low - m_low * r_high) - m_low * r_low
    power = jax.lax.bitcast_convert_type(0x7F000000 - (bits & _INFINITY_BITS), jnp.float32)
    return (r + r * residual) * power


def _upper_half(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns float32 numbers without the lower half of their mantissas."""
    return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(x, jnp.int32) & -0x1000, jnp.float32)


def round_up_to_power_of_two(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns 2^ceil(log2 x) of positive normal float32 numbers exactly, by a carry from the mantissa."""
    bits: Int[Array, "..."] = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jax.lax.bitcast_convert_type((bits + 0x7FFFFF) & 0x7F800000, jnp.float32)


def values_from_scaled(scaled: Float[Array, "..."]) -> Float[Array, "..."]:
    return jnp.clip(scaled, -E4M3_MAX, E4M3_MAX).astype(E4M3)


def _split(x: Array, tile: tuple[int, int]) -> Array:
    """Returns [..., M, K] as [..., M/rows, rows, K/columns, columns], padded with zeros to whole tiles."""
    *batch, m, k = x.shape
    rows, columns = tile
    if m % rows or k % columns:
        x = jnp.pad(x, [(0, 0)] * len(batch) + [(0, -m % rows), (0, -k % columns)])
    return x.reshape(*batch, -(-m // rows), rows, -(-k // columns), columns)


def _join(blocks: Array, shape: tuple[int, ...]) -> Array:
    """Undoes `_split`: returns an array of `shape`, without the padding."""
    *batch, m_blocks, rows, k_blocks, columns = blocks.shape
    return blocks.reshape(*batch, m_blocks * rows, k_blocks * columns)[..., : shape[-2], : shape[-1]]
