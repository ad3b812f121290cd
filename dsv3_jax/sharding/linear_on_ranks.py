"""A linear map on a mesh: every rank multiplies its own tokens (report section 3.2).

Of the weight, parts that lie on the fsdp axis are put together for the product, and its gradient is summed in float32
straight into the parts. What lies on the tensor axis stays there: parts of the outputs, or parts of the inputs, whose
partial results are then summed. XLA, left to itself, cannot divide the kernels of FP8 products, and sums a gradient
whole on every device before each takes its part.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from dsv3_jax.model import Head
from dsv3_jax.modules.linear import Linear
from dsv3_jax.modules.router import Router
from dsv3_jax.sharding.ranks import on_every_rank
from dsv3_jax.sharding.rules import BATCH_AXES, WITHIN_A_STAGE, parameter_specs

_FSDP, _TENSOR = "fsdp", "tensor"


def distribute_linear_maps(model: nnx.Module, mesh: Mesh) -> None:
    """Makes every linear map of the model, output head and routers too, multiply each rank's own tokens."""
    for path, module in model.iter_modules():
        if isinstance(module, Linear | Head | Router):
            dimensions = len(module.out_shape) + len(module.in_shape) if isinstance(module, Linear) else 2
            module.on_ranks = LinearOnRanks.of(mesh, str(path[-1]), module.weight.shape[-dimensions:])


@dataclasses.dataclass(frozen=True)
class LinearOnRanks:
    """What a `Linear` hands its product to.

    Attributes:
      lies: mesh axis of every dimension of the weight [*out, *in].
    """

    mesh: Mesh
    lies: tuple[str | None, ...]

    @classmethod
    def of(cls, mesh: Mesh, name: str, shape: tuple[int, ...]) -> LinearOnRanks:
        """For a map of that name in the parameter tree, whose weight has that shape."""
        weight = jax.ShapeDtypeStruct(shape, jnp.float32)
        cut = parameter_specs({name: {"weight": weight}}, mesh, WITHIN_A_STAGE)[name]["weight"]
        return cls(mesh, (*cut, *[None] * (len(shape) - len(cut))))

    def __call__(
        self,
        product: Callable[[Array, Array], Array],
        x: Float[Array, "..."],
        weight: Float[Array, "..."],
        *,
        batch_axes: int,
        in_axes: int,
        dtype: jnp.dtype,
    ) -> Float[Array, "..."]:
        """`product(x, weight)` on every rank.

        Args:
          x: tokens on the batch axes of the mesh in its first dimension; its last ones are the map's inputs.
          weight: [*out, *in].
          batch_axes: dimensions of `x`, and of the result, before those of the map.
          in_axes: dimensions of the weight that are inputs.
          dtype: in which the weight's parts travel.
        """
        lies = self.lies
        kept = tuple(None if axis == _FSDP else axis for axis in lies)
        out, inputs = kept[: weight.ndim - in_axes], kept[weight.ndim - in_axes :]
        batch = (BATCH_AXES, *[None] * (batch_axes - 1))

        def on_a_rank(x: Array, weight: Array) -> Array:
            if _FSDP in lies:
                weight = _whole(weight, lies.index(_FSDP), dtype)
            y = product(x, weight)
            return lax.psum(y, _TENSOR) if _TENSOR in inputs else y

        between = [None] * (x.ndim - batch_axes - in_axes)
        return on_every_rank(
            self.mesh,
            on_a_rank,
            in_specs=(PartitionSpec(*batch, *between, *inputs), PartitionSpec(*lies)),
            out_specs=PartitionSpec(*batch, *out),
        )(x, weight)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _whole(part: Float[Array, "..."], axis: int, dtype: jnp.dtype) -> Float[Array, "..."]:
    """The parts of all fsdp ranks along that dimension, in `dtype`; gradients are summed in at least float32."""
    return lax.all_gather(part.astype(dtype), _FSDP, axis=axis, tiled=True)


def _whole_forward(part: Array, axis: int, dtype: jnp.dtype) -> tuple[Array, Array]:
    return _whole(part, axis, dtype), jnp.empty(0, part.dtype)  # residuals must be arrays; this one carries a dtype


def _whole_backward(axis: int, dtype: jnp.dtype, like: Array, bar: Array) -> tuple[Array]:
    del dtype
    wide = bar.astype(jnp.promote_types(like.dtype, jnp.float32))
    return (lax.psum_scatter(wide, _FSDP, scatter_dimension=axis, tiled=True).astype(like.dtype),)


_whole.defvjp(_whole_forward, _whole_backward)
