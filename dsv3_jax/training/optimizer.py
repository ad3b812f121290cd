"""AdamW or Muon with clipping, and the running average of the weights (report sections 3.2.3 and 4.2)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from dsv3_jax.config import ModelConfig
from dsv3_jax.training.config import TrainingConfig
from dsv3_jax.training.muon import scale_by_muon

Tree = Any
"""A pytree of arrays."""


def make_optimizer(config: TrainingConfig, moment_dtype: str, model: ModelConfig) -> optax.GradientTransformation:
    """Returns gradient clipping, Adam or Muon, and decoupled weight decay.

    The training step multiplies by the learning rate.

    Args:
      moment_dtype: dtype in which moments are stored; their update is computed in float32.
      model: the model whose parameters Muon updates. (AdamW needs not know them.)
    """
    dtype = jnp.dtype(moment_dtype)
    rule = _adam(config, dtype)
    if config.optimizer == "muon":
        rule = scale_by_muon(rule, model, config.muon_momentum, dtype)
    return optax.chain(
        optax.clip_by_global_norm(config.gradient_clip),
        rule,
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
    )


def _adam(config: TrainingConfig, moment_dtype: jnp.dtype) -> optax.GradientTransformation:
    """Returns Adam computed in float32, with both moments rounded to `moment_dtype` after each update."""
    adam = optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon)

    def in_dtype(state: Any, dtype: jnp.dtype) -> Any:
        mu, nu = (jax.tree.map(lambda leaf: leaf.astype(dtype), tree) for tree in (state.mu, state.nu))
        return state._replace(mu=mu, nu=nu)

    def update(updates: Tree, state: Any, params: Tree = None) -> tuple[Tree, Any]:
        # In products with bfloat16 moments the decays would be rounded to bfloat16 too: 0.9 to 0.8984.
        updates, state = adam.update(updates, in_dtype(state, jnp.dtype(jnp.float32)), params)
        return updates, in_dtype(state, moment_dtype)

    return optax.GradientTransformation(lambda params: in_dtype(adam.init(params), moment_dtype), update)


def decay_mask(params: Tree) -> Tree:
    """Returns True for each parameter that weight decay applies to: all but the gains of norms."""

    def is_decayed(path: tuple, _: jax.Array) -> bool:
        return not any("norm" in str(getattr(key, "key", key)) for key in path)

    return jax.tree_util.tree_map_with_path(is_decayed, params)


def update_average(average: Tree, params: Tree, decay: float, step: jax.Array) -> Tree:
    """Returns the exponential moving average of the weights after step number `step` (from 0), in their own dtype.

    The decay starts at 1/10 and rises to `decay`. With a constant decay the average of a short run would consist mostly
    of its initial weights.
    """
    step = step.astype(jnp.float32)
    rate = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda old, new: rate * old + (1.0 - rate) * new, average, params)
