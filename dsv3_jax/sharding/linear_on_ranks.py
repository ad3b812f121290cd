"""A linear map on a mesh: every rank multiplies its own tokens (report section 3.2).

A weight's FSDP shards are all-gathered for the product (`fsdp_gather`).
Shards along the tensor axis are not gathered: a rank computes a part of the outputs, or multiplies a part of the
inputs, and the partial results are then summed. For a map to the heads of attention, tokens are all-gathered over the
context axis and each of its ranks computes some of the heads. This is done by hand because XLA cannot partition the
kernels of FP8 products, and because it would all-reduce whole gradients before each rank takes its shard.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from dsv3_jax.modules.parameter import ParameterShape
from dsv3_jax.precision.fp8_weight import Fp8Weight
from dsv3_jax.precision.prepared import PreparedRows
from dsv3_jax.sharding.fsdp_gather import gather_over_fsdp
from dsv3_jax.sharding.ranks import on_every_rank
from dsv3_jax.sharding.rules import CONTEXT, gathered_dimension, token_axes, weight_axes

_TENSOR = "tensor"


def multiply_on_ranks(
    mesh: Mesh,
    product: Callable[[Any, Any], Array],
    x: Float[Array, "..."] | PreparedRows,
    weight: Float[Array, "..."] | Fp8Weight,
    shape: ParameterShape,
    *,
    batch_axes: int,
    in_axes: int,
    gather_dtype: jnp.dtype,
) -> Float[Array, "..."]:
    """Returns `product(x, weight)`, computed by every rank for its own tokens; arguments as in `Devices.multiply`."""
    axes = weight_axes(shape, mesh)
    gathered = gathered_dimension(shape, axes)
    kept = tuple(None if dimension == gathered else over for dimension, over in enumerate(axes))
    out, inputs = kept[: weight.ndim - in_axes], kept[weight.ndim - in_axes :]
    batch = token_axes(mesh, x.shape[:batch_axes])
    to_heads = shape.axes[:1] == ("heads",)
    gather_tokens = to_heads and CONTEXT in batch

    def on_a_rank(x: Array | PreparedRows, weight: Any) -> Array:
        if gather_tokens:
            x = jax.tree.map(lambda part: lax.all_gather(part, CONTEXT, axis=batch.index(CONTEXT), tiled=True), x)
        if gathered is not None:
            weight = gather_over_fsdp(weight, gathered, gather_dtype, in_axes=in_axes, ranks=axes[gathered])
        y = product(x, weight)
        return lax.psum(y, _TENSOR) if _TENSOR in inputs else y

    between = [None] * (x.ndim - batch_axes - in_axes)
    return on_every_rank(
        mesh,
        on_a_rank,
        in_specs=(PartitionSpec(*batch, *between, *inputs), PartitionSpec(*axes)),
        out_specs=PartitionSpec(*[None if to_heads and axis == CONTEXT else axis for axis in batch], *out),
    )(x, weight)
