"""E5M6, the 12-bit format in which the output of attention is kept (report section 3.3.3).

A number has one sign, five exponent and six mantissa bits: the upper twelve bits of a float16. It is rounded to nearest
even, and two numbers are packed into three bytes. Each row's tiles of 128 numbers share a scale that is a power of two,
so that scaling does not round, and re-tiling along the columns later changes scales by powers of two only.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt8

from dsv3_jax.precision.tiles import magnitude_scales
from pallas_kernels import TILE

LARGEST = 65024.0  # (1 + 63/64) * 2^15


@functools.partial(jax.tree_util.register_dataclass, data_fields=("packed", "scales"), meta_fields=("width",))
@dataclasses.dataclass(frozen=True)
class PackedE5M6:
    """A matrix [M, width] in 1x128 tiles: 1.5 bytes per number and a float32 scale per tile.

    Attributes:
      packed: [M, pairs, 3], pairs = ceil(width / 2).
      scales: float32 [M, ceil(width / 128)], powers of two.
      width: number of columns.
    """

    packed: UInt8[Array, "M pairs 3"]
    scales: Float[Array, "M tiles"]
    width: int


def pack(x: Float[Array, "M K"]) -> PackedE5M6:
    """Returns `x` rounded to E5M6; a tile that holds an infinity or NaN becomes NaN as a whole."""
    rows, width = x.shape
    x = x.astype(jnp.float32)
    scales = magnitude_scales(x, (1, TILE), LARGEST, power_of_two=True)
    scaled = jnp.clip(x / _spread(scales, width), -LARGEST, LARGEST)
    bits = lax.bitcast_convert_type(_rounded_to_six_bits(scaled).astype(jnp.float16), jnp.uint16) >> 4
    first, second = jnp.moveaxis(jnp.pad(bits, ((0, 0), (0, width % 2))).reshape(rows, -1, 2), -1, 0)
    packed = jnp.stack([first >> 4, ((first & 15) << 4) | (second >> 8), second & 255], axis=-1)
    return PackedE5M6(packed.astype(jnp.uint8), scales, width)


def unpack(q: PackedE5M6) -> Float[Array, "M K"]:
    """Returns the numbers that `q` stands for, in float32."""
    high, middle, low = jnp.moveaxis(q.packed.astype(jnp.uint16), -1, 0)
    pairs = jnp.stack([(high << 4) | (middle >> 4), ((middle & 15) << 8) | low], axis=-1)
    bits = pairs.reshape(q.packed.shape[0], -1)[:, : q.width] << 4
    return lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32) * _spread(q.scales, q.width)


def _rounded_to_six_bits(x: Float[Array, "M K"]) -> Float[Array, "M K"]:
    """Rounds to nearest even at the step of E5M6: 2^-6 of the leading power of two, but at least 2^-20."""
    _, exponent = jnp.frexp(x)  # |x| = m 2^exponent, 1/2 <= m < 1
    step = jnp.ldexp(jnp.float32(1), jnp.maximum(exponent - 7, -20))
    return jnp.round(x / step) * step


def _spread(scales: Float[Array, "M tiles"], width: int) -> Float[Array, "M K"]:
    return jnp.repeat(scales, TILE, axis=1)[:, :width]
