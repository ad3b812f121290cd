"""The weights of several layers, an array of its own for each.

XLA's CPU backend copies what it slices out of an array, such as the experts of one layer. It does not copy what a
branch of a conditional reads.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from dsv3_jax.precision.int8_weight import Int8Weight
from dsv3_jax.precision.tiled_weight import TiledWeight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ByLayer[Weight: jax.Array | Int8Weight | TiledWeight]:
    """One parameter of all layers, which takes the place of a weight with an axis of layers in front.

    Attributes:
      layers: the weight of each layer.
    """

    layers: tuple[Weight, ...]

    @classmethod
    def of(cls, stack: Weight) -> ByLayer[Weight]:
        """Returns the layers of a weight [L, ...]."""
        return cls(tuple(stack[layer] for layer in range(stack.shape[0])))  # pyright: ignore[reportArgumentType]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array that the weight replaces."""
        return (len(self.layers), *self.layers[0].shape)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the values."""
        return self.layers[0].dtype

    @property
    def ndim(self) -> int:
        """The number of axes of `shape`."""
        return len(self.shape)

    def __getitem__(self, key: Ellipsis) -> ByLayer[Weight]:  # pyright: ignore[reportInvalidTypeForm]
        """Returns the whole weight, as modules read their parameters."""
        assert key is Ellipsis
        return self


def with_layer(
    function: Callable[..., Array], weights: tuple[Any, ...], layer: Int[Array, ""] | None
) -> Callable[..., Array]:
    """Returns `function` with its first arguments given: the weights, of this layer where they are `ByLayer`."""
    if not isinstance(weights[0], ByLayer):
        return functools.partial(function, *weights)
    assert layer is not None
    branches = [functools.partial(function, *own) for own in zip(*(each.layers for each in weights), strict=True)]
    return lambda *arguments: lax.switch(layer, branches, *arguments)
