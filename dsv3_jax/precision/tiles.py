"""Matrices in FP8 with one scale per tile (report section 3.3.2): those of `pallas_kernels`, and others emulated."""

from __future__ import annotations

import dataclasses
import functools
from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

import pallas_kernels as pk
from pallas_kernels.quantize.quantized import TILE_SHAPE
from pallas_kernels.quantize.reference import magnitude_bits, reciprocal, scales_from_magnitude

_KERNEL_TILES = {shape: name for name, shape in TILE_SHAPE.items()}
_DTYPES = {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2}


@functools.partial(jax.tree_util.register_dataclass, data_fields=("values", "scales"), meta_fields=("tile",))
@dataclasses.dataclass(frozen=True)
class EmulatedTiles:
    """A matrix, or a stack of them, in a format or tile that no kernel has. A pytree.

    Attributes:
      values: [..., M, K] of an FP8 dtype.
      scales: float32 [..., ceil(M / tile rows), ceil(K / tile columns)], one per tile.
      tile: rows and columns that share a scale.
    """

    values: Float[Array, "... M K"]
    scales: Float[Array, "... m k"]
    tile: tuple[int, int]

    @property
    def mT(self) -> EmulatedTiles:
        """Returns the transposed matrix."""
        return EmulatedTiles(self.values.mT, self.scales.mT, (self.tile[1], self.tile[0]))


type Tiles = pk.Quantized | EmulatedTiles


def quantize(x: Float[Array, "... M K"], tile: tuple[int, int], number_format: str, *, power_of_two: bool) -> Tiles:
    """Returns `x` in FP8.

    Args:
      tile: rows and columns that share a scale; (0, 0) for one scale per matrix.
      number_format: "e4m3" or "e5m2".
      power_of_two: round the scales up to powers of two.
    """
    if number_format == "e4m3" and tile in _KERNEL_TILES:
        return pk.quantize(x, tile=_KERNEL_TILES[tile], power_of_two_scales=power_of_two)  # pyright: ignore
    tile = tile if tile != (0, 0) else cast(tuple[int, int], x.shape[-2:])
    dtype = _DTYPES[number_format]
    largest = float(jnp.finfo(dtype).max)
    x = x.astype(jnp.float32)
    scales = magnitude_scales(x, tile, largest, power_of_two=power_of_two)
    values = jnp.clip(x * _spread(reciprocal(scales), tile, x.shape), -largest, largest)
    return EmulatedTiles(values.astype(dtype), scales, tile)


def dequantize(q: Tiles) -> Float[Array, "... M K"]:
    """Returns the numbers that `q` stands for, in float32."""
    if isinstance(q, pk.Quantized):
        return pk.dequantize(q)
    return q.values.astype(jnp.float32) * _spread(q.scales, q.tile, q.values.shape)


def magnitude_scales(
    x: Float[Array, "... M K"], tile: tuple[int, int], largest: float, *, power_of_two: bool
) -> Float[Array, "... m k"]:
    """Returns each tile's scale, its largest magnitude over `largest`; NaN where that magnitude is not finite."""
    *batch, m, k = x.shape
    rows, columns = tile
    padded = jnp.pad(x, [(0, 0)] * len(batch) + [(0, -m % rows), (0, -k % columns)])
    tiles = padded.reshape(*batch, -(-m // rows), rows, -(-k // columns), columns)
    return scales_from_magnitude(jnp.max(magnitude_bits(tiles), axis=(-3, -1)), power_of_two, largest)


def _spread(scales: Float[Array, "... m k"], tile: tuple[int, int], shape: tuple[int, ...]) -> Float[Array, "... M K"]:
    rows = jnp.repeat(scales, tile[0], axis=-2)[..., : shape[-2], :]
    return jnp.repeat(rows, tile[1], axis=-1)[..., : shape[-1]]
