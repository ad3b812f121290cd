"""All-gathers the FSDP shards of weights, in the format in which a product multiplies by them.

For FP8 products the values in e4m3 and their scales are gathered, a quarter of the bytes of float32 masters (report
section 3.3.2). Gradients are reduce-scattered in at least float32.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from dsv3_jax.precision.fp8_weight import Fp8Weight
from dsv3_jax.sharding.fp8_shards import quantized_shard, sent_as_bits
from dsv3_jax.sharding.rules import MeshAxes


def gather_over_fsdp(
    shard: Float[Array, "..."],
    axis: int,
    dtype: jnp.dtype,
    *,
    in_axes: int,
    stacked: int = 0,
    ranks: MeshAxes = "fsdp",
) -> Float[Array, "..."] | Fp8Weight:
    """Returns the weight whose shards along dimension `axis` are on the ranks of the mesh axes `ranks`.

    Args:
      shard: [*stacked, *out, *in], with `stacked` leading axes of separate matrices and `in_axes` axes of `in`.
      axis: the first of the axes of `out` or of `in`.
      dtype: dtype in which it is gathered. float8_e4m3fn is for weights that are multiplied in blocks of 128 x 128.
    """
    if dtype != jnp.float8_e4m3fn:
        return _gathered(shard, axis, dtype, ranks)
    part = quantized_shard(lax.stop_gradient(shard), axis, ranks, in_axes=in_axes, stacked=stacked)
    values = sent_as_bits(functools.partial(lax.all_gather, axis_name=ranks, axis=axis, tiled=True), part.values)
    columns = math.prod(values.shape[values.ndim - in_axes :])
    return Fp8Weight(values, part.scales, columns, gradient=_gradient_of(shard, axis, ranks))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gathered(shard: Float[Array, "..."], axis: int, dtype: jnp.dtype, ranks: MeshAxes) -> Float[Array, "..."]:
    return lax.all_gather(shard.astype(dtype), ranks, axis=axis, tiled=True)


def _gather_forward(shard: Array, axis: int, dtype: jnp.dtype, ranks: MeshAxes) -> tuple[Array, Array]:
    # Residuals must be arrays: this empty one carries the shard's dtype.
    return _gathered(shard, axis, dtype, ranks), jnp.empty(0, shard.dtype)


def _gather_backward(axis: int, dtype: jnp.dtype, ranks: MeshAxes, like: Array, bar: Array) -> tuple[Array]:
    del dtype
    return (_scattered(bar, axis, like.dtype, ranks),)


_gathered.defvjp(_gather_forward, _gather_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gradient_of(shard: Float[Array, "..."], axis: int, ranks: MeshAxes) -> Float[Array, "..."]:
    """Returns an array of the gathered weight's shape that gets the weight's gradient; its values are never read."""
    shape = tuple(size * (lax.axis_size(ranks) if i == axis else 1) for i, size in enumerate(shard.shape))
    return jnp.zeros(shape, jnp.promote_types(shard.dtype, jnp.float32))


def _gradient_forward(shard: Array, axis: int, ranks: MeshAxes) -> tuple[Array, Array]:
    return _gradient_of(shard, axis, ranks), jnp.empty(0, shard.dtype)


def _gradient_backward(axis: int, ranks: MeshAxes, like: Array, bar: Array) -> tuple[Array]:
    return (_scattered(bar, axis, like.dtype, ranks),)


_gradient_of.defvjp(_gradient_forward, _gradient_backward)


def _scattered(bar: Float[Array, "..."], axis: int, dtype: jnp.dtype, ranks: MeshAxes) -> Float[Array, "..."]:
    wide = bar.astype(jnp.promote_types(dtype, jnp.float32))
    return lax.psum_scatter(wide, ranks, scatter_dimension=axis, tiled=True).astype(dtype)
