"""Quantizes a rank's shard of a weight in the blocks of 128 x 128 of the whole weight (report section 3.3.2).

A block may have parts on several ranks. The largest magnitudes of the parts are all-gathered, so that every rank has
the scale of every whole block. The shards together have the bits of a weight that is quantized whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dsv3_jax.precision.fp8_weight import Fp8Weight
from dsv3_jax.sharding.rules import MeshAxes
from pallas_kernels import TILE
from pallas_kernels.quantize.reference import magnitude_bits, reciprocal, scales_from_magnitude, values_from_scaled


def quantized_shard(
    shard: Float[Array, "..."], axis: int | None, ranks: MeshAxes, *, in_axes: int, stacked: int
) -> Fp8Weight:
    """Returns the values of the shard, and the scales of the whole weight.

    Args:
      shard: [*stacked, *out, *in], with `stacked` leading axes of separate matrices and `in_axes` axes of `in`.
      axis: the dimension that is sharded: the first of the axes of `out` or of `in`. None if every rank has the whole
        weight.
      ranks: the mesh axes over which it is sharded.
    """
    columns = math.prod(shard.shape[shard.ndim - in_axes :])
    matrix = shard.reshape(*shard.shape[:stacked], -1, columns).astype(jnp.float32)
    along = matrix.ndim - (1 if axis is not None and axis >= shard.ndim - in_axes else 2)
    width = matrix.shape[along]
    part = TILE if axis is None else math.gcd(TILE, width)  # of a block's side, the most that is always on one rank
    rows, cols = (part, TILE) if along == matrix.ndim - 2 else (TILE, part)
    padding = [(0, 0)] * stacked + [(0, -matrix.shape[-2] % rows), (0, -columns % cols)]
    padded = jnp.pad(matrix, padding)
    m, k = padded.shape[-2:]
    parts = padded.reshape(*padded.shape[:-2], m // rows, rows, k // cols, cols)
    largest = jnp.max(magnitude_bits(parts), axis=(-3, -1))
    if axis is None:
        scales = own = scales_from_magnitude(largest, power_of_two=False)
    else:
        largest = lax.all_gather(largest, ranks, axis=along, tiled=True)
        scales = scales_from_magnitude(_largest_of(largest, along, TILE // part), power_of_two=False)
        here = width // part
        spread = jnp.repeat(scales, TILE // part, axis=along)
        own = lax.dynamic_slice_in_dim(spread, lax.axis_index(ranks) * here, here, axis=along)
    values = values_from_scaled(parts * reciprocal(own)[..., :, None, :, None]).reshape(padded.shape)
    values = values[..., : matrix.shape[-2], :columns].reshape(shard.shape)
    return Fp8Weight(values, scales, columns)


def _largest_of(bits: Int[Array, "..."], axis: int, count: int) -> Int[Array, "..."]:
    """Returns the largest of every `count` neighbours along an axis, the last of which may be fewer."""
    padding = [(0, -size % count if i == axis else 0) for i, size in enumerate(bits.shape)]
    padded = jnp.pad(bits, padding)
    return jnp.max(padded.reshape(*padded.shape[:axis], -1, count, *padded.shape[axis + 1 :]), axis=axis + 1)


def sent_as_bits(send: Callable[[Array], Array], values: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns `send(values)` for values in FP8, which are sent as bytes: XLA would send float16 between CPUs."""
    return lax.bitcast_convert_type(send(lax.bitcast_convert_type(values, jnp.uint8)), values.dtype)
