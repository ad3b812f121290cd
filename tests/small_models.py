"""Makes models with random weights drawn by numpy, so that nothing is compiled to make them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv3_jax.config import ModelConfig
from dsv3_jax.model import DeepSeekV3


def small_model(config: ModelConfig, seed: int, **options: Any) -> DeepSeekV3:
    """Returns a `DeepSeekV3` with weights N(0, initializer_range^2), gains 1 and router biases 0."""
    model = nnx.eval_shape(lambda: DeepSeekV3(config, rngs=nnx.Rngs(0), **options))
    random = np.random.default_rng(seed)

    def value(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path)
        if "norm" in name:
            return jnp.ones(leaf.shape, leaf.dtype)
        if "bias" in name:
            return jnp.zeros(leaf.shape, leaf.dtype)
        return jnp.asarray(config.initializer_range * random.standard_normal(leaf.shape), leaf.dtype)

    nnx.update(model, jax.tree_util.tree_map_with_path(value, nnx.state(model)))
    return model
