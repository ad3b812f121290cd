"""Parameters with the logical axes of their dimensions, from which every sharding is derived."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

LogicalAxis = Literal["embed", "wide", "heads", "latent", "expert", "expert_width"]
"""Names of a dimension's meaning. `dsv3_jax.sharding.rules.AxisRules` maps each to axes of a mesh.

embed: the hidden size (of up-projections from a latent: the latent's width).  wide: feed-forward widths, the
vocabulary, and heads as inputs.  heads: heads as outputs.  latent: outputs of down-projections and routers.  expert:
routed experts.  expert_width: their inner width.
"""

LAYERS = "layers"
"""The logical axis of stacked layers, which the `nnx.vmap` that stacks them puts before a parameter's own axes."""


@dataclasses.dataclass(frozen=True)
class ParameterShape:
    """Shape and logical axes of one layer's parameter, as the whole model has it.

    Attributes:
      shape: sizes of the dimensions, unsharded and without the axis of stacked layers.
      axes: a logical axis per dimension; None where a dimension is never sharded. Empty for a parameter that every
        device holds whole, its stack of layers included.
    """

    shape: tuple[int, ...]
    axes: tuple[LogicalAxis | None, ...]

    def parameter(self, value: jax.Array) -> nnx.Param:
        """Returns a parameter of that value which carries the logical axes as Flax's own metadata."""
        return nnx.Param(value, out_sharding=self.axes, eager_sharding=False)

    def normal(self, rngs: nnx.Rngs, scale: float, dtype: jnp.dtype) -> nnx.Param:
        """Returns a parameter drawn from N(0, scale^2) in float32 and rounded to `dtype` (report section 4.2)."""
        return self.parameter((scale * jax.random.normal(rngs.params(), self.shape, jnp.float32)).astype(dtype))

    def ones(self, dtype: jnp.dtype) -> nnx.Param:
        """Returns a parameter of ones."""
        return self.parameter(jnp.ones(self.shape, dtype))
