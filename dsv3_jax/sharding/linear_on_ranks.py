"""A linear map on a mesh: every rank multiplies its own tokens (report section 3.2).

A weight's shards along the fsdp axis are all-gathered for the product (`fsdp_gather`).
Shards along the tensor axis are not gathered: a rank computes a part of the outputs, or multiplies a part of the
inputs, and the partial results are then summed. This is done by hand because XLA cannot partition the kernels of FP8
products, and because it would all-reduce whole gradients before each rank takes its shard.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from dsv3_jax.modules.parameter import ParameterShape
from dsv3_jax.precision.fp8_weight import Fp8Weight
from dsv3_jax.sharding.fsdp_gather import gather_over_fsdp
from dsv3_jax.sharding.ranks import on_every_rank
from dsv3_jax.sharding.rules import BATCH_AXES, WITHIN_A_STAGE, weight_axes

_FSDP, _TENSOR = "fsdp", "tensor"


def multiply_on_ranks(
    mesh: Mesh,
    product: Callable[[Array, Any], Array],
    x: Float[Array, "..."],
    weight: Float[Array, "..."] | Fp8Weight,
    shape: ParameterShape,
    *,
    batch_axes: int,
    in_axes: int,
    gather_dtype: jnp.dtype,
) -> Float[Array, "..."]:
    """Returns `product(x, weight)`, computed by every rank for its own tokens; arguments as in `Devices.multiply`."""
    axes = weight_axes(shape, mesh, WITHIN_A_STAGE)
    gathered = axes.index(_FSDP) if _FSDP in axes else None
    kept = tuple(None if axis == _FSDP else axis for axis in axes)
    out, inputs = kept[: weight.ndim - in_axes], kept[weight.ndim - in_axes :]
    batch = (BATCH_AXES, *[None] * (batch_axes - 1))

    def on_a_rank(x: Array, weight: Any) -> Array:
        if gathered is not None:
            weight = gather_over_fsdp(weight, gathered, gather_dtype, in_axes=in_axes)
        y = product(x, weight)
        return lax.psum(y, _TENSOR) if _TENSOR in inputs else y

    between = [None] * (x.ndim - batch_axes - in_axes)
    return on_every_rank(
        mesh,
        on_a_rank,
        in_specs=(PartitionSpec(*batch, *between, *inputs), PartitionSpec(*axes)),
        out_specs=PartitionSpec(*batch, *out),
    )(x, weight)
