"""The token embedding and the output head, both shared by the main model and the MTP modules."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.modules.devices import Devices
from dsv3_jax.modules.parameter import ParameterShape
from dsv3_jax.precision import Precision
from dsv3_jax.precision.int8_weight import Int8Weight, WithRounded
from dsv3_jax.precision.tiled_weight import TiledWeight
from dsv3_jax.precision.weight_product import weight_product


class Embedding(nnx.Module):
    """Looks up the embedding of each token: Emb of report Eq. 21."""

    def __init__(
        self, config: ModelConfig, *, dtype: jnp.dtype, precision: Precision, devices: Devices, rngs: nnx.Rngs
    ):
        self.precision = precision
        self.devices = devices
        self.shape = ParameterShape((config.vocab_size, config.hidden_size), ("wide", "embed"))
        self.weight = self.shape.normal(rngs, config.initializer_range, dtype)

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T d"]:
        """Returns the tokens' rows of the table, in the recipe's dtype."""
        return self.devices.look_up(self.weight[...], tokens, self.shape, self.precision.dtype)


class Head(nnx.Module):
    """Computes the logits of the next token: OutHead of report Eq. 23. Logits are at least float32 in every recipe."""

    def __init__(
        self, config: ModelConfig, *, dtype: jnp.dtype, precision: Precision, devices: Devices, rngs: nnx.Rngs
    ):
        self.precision = precision
        self.devices = devices
        self.shape = ParameterShape((config.vocab_size, config.hidden_size), ("wide", "embed"))
        self.weight = self.shape.normal(rngs, config.initializer_range, dtype)

    def __call__(self, hidden: Float[Array, "*batch d"]) -> Float[Array, "*batch V"]:
        """Returns the logits from hidden states that have passed the final norm."""
        dtype = self.precision.dtype
        return self.devices.multiply(
            self._logits,
            hidden,
            self.exact_weight,
            self.shape,
            batch_axes=hidden.ndim - 1,
            in_axes=1,
            gather_dtype=dtype,
        )

    @property
    def exact_weight(self) -> Any:
        """The weight that the logits are computed with: an array, or one in another format."""
        weight = self.weight[...]
        return weight.exact if isinstance(weight, WithRounded) else weight

    def draft(self, hidden: Float[Array, "*batch d"]) -> Float[Array, "*batch V"] | None:
        """Returns the logits by the weight in eight bits, of which drafts are drawn; None where there is none."""
        weight = self.weight[...]
        return self._logits(hidden, weight.rounded) if isinstance(weight, WithRounded) else None

    def _logits(
        self, hidden: Float[Array, "*batch d"], weight: Float[Array, "V d"] | Int8Weight | TiledWeight
    ) -> Float[Array, "*batch V"]:
        dtype = self.precision.dtype
        wide = jnp.promote_types(dtype, jnp.float32)
        if isinstance(weight, Int8Weight | TiledWeight):
            return weight.product(hidden, wide)
        logits = weight_product(hidden.reshape(-1, hidden.shape[-1]), weight, dtype, wide)
        return logits.reshape(*hidden.shape[:-1], logits.shape[-1])
