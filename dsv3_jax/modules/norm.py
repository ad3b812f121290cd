"""Root-mean-square normalisation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dsv3_jax.modules.linear import Linear
from dsv3_jax.modules.ordered_sum import ordered_sum
from dsv3_jax.modules.parameter import ParameterShape
from dsv3_jax.precision import QuantizedRows, normed_rows, quantizes_norms
from dsv3_jax.precision.fp8_weight import Fp8Weight


class RMSNorm(nnx.Module):
    """Computes y = w * x / sqrt(mean(x^2) + epsilon), statistics and gain in float32, the result in the dtype of x."""

    def __init__(self, width: int, epsilon: float, *, dtype: jnp.dtype):
        self.weight = ParameterShape((width,), axes=()).ones(dtype)
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """Returns y."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return self._scaled(wide, jnp.mean(jnp.square(wide), axis=-1)).astype(x.dtype)

    def before_linear(
        self, x: Float[Array, "*batch width"], linear: Linear
    ) -> Float[Array, "*batch width"] | QuantizedRows:
        """Returns y as the linear maps behind the norm read it: quantized in the same pass, where these have FP8 tiles.

        Args:
          linear: one of these maps, whose recipe, devices and format of the weight are those of all.
        """
        return self._quantized(x, linear, with_rows=False, with_input=False)[0]

    def beside_residual(
        self, x: Float[Array, "*batch width"], linear: Linear, *, with_rows: bool = False
    ) -> tuple[Float[Array, "*batch width"] | QuantizedRows, Float[Array, "*batch width"]]:
        """Returns y as `before_linear` does, and x for the residual connection: both gradients are added in one pass.

        Args:
          linear: one of the linear maps behind the norm.
          with_rows: whether anything else reads y too.
        """
        y, x_again = self._quantized(x, linear, with_rows=with_rows, with_input=True)
        return y, x if x_again is None else x_again

    def _quantized(
        self, x: Array, linear: Linear, *, with_rows: bool, with_input: bool
    ) -> tuple[Array | QuantizedRows, Array | None]:
        recipe = linear.precision.fp8
        in_fp8 = isinstance(linear.weight[...], jax.Array | Fp8Weight)  # other formats are made for generation alone
        if recipe is None or not in_fp8 or not quantizes_norms(recipe, x.shape[-1]):
            return self(x), None
        return normed_rows(
            x,
            self.weight[...],
            self.epsilon,
            power_of_two_scales=recipe.power_of_two_scales,
            with_rows=with_rows,
            with_input=with_input,
            run=linear.devices.run_on_tokens,
        )

    def decode(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """Returns y; on a CPU a row's result is the same bits whatever the number of rows."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return self._scaled(wide, ordered_sum(jnp.square(wide)) / x.shape[-1]).astype(x.dtype)

    def _scaled(self, x: Float[Array, "*batch width"], mean_square: Float[Array, " *batch"]) -> Array:
        return x * jax.lax.rsqrt(mean_square[..., None] + self.epsilon) * self.weight[...].astype(x.dtype)
