"""AdamW as in the report's section 4.2, and the average of the weights (section 3.2.3).

The transformation gives a direction; the training step multiplies it by the learning rate, which is a function of
tokens and not of the optimizer's own count. Masters, gradients and moments are float32.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from dsv3_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and gradient clipping.

    Attributes:
      beta1, beta2, weight_decay, clip_norm: the report's. A `clip_norm` of None leaves gradients as they are.
      eps: not published; 1e-8 is AdamW's usual.
      ema_decay: of the average of the weights (its value is not published); None keeps no average.
    """

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    ema_decay: float | None = 0.999

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2", "ema_decay"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ConfigError(f"optimizer.{name} must lie in [0, 1), not {value}")
        if not 0 < self.eps < float("inf"):
            raise ConfigError(f"optimizer.eps must be positive, not {self.eps}")
        if not 0 <= self.weight_decay < float("inf"):
            raise ConfigError(f"optimizer.weight_decay must not be negative, not {self.weight_decay}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ConfigError(f"optimizer.clip_norm must be positive or None, not {self.clip_norm}")


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clipped AdamW without its learning rate: the update is `-learning_rate * direction`.

    Weight decay acts on every matrix, embedding and head included, and not on the gains of norms.
    """
    parts = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
    return optax.chain(
        *parts,
        optax.scale_by_adam(config.beta1, config.beta2, config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
    )


def decay_mask(params: PyTree[Array]) -> PyTree[bool]:
    """True where weight decay acts: everywhere but in modules whose name ends in `norm`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: not _is_norm_gain(path), params)


def _is_norm_gain(path: tuple[Any, ...]) -> bool:
    return any(str(getattr(entry, "key", entry)).endswith("norm") for entry in path)


def update_average(
    average: PyTree[Array], params: PyTree[Array], step: Int[Array, ""], decay: float
) -> PyTree[Float[Array, "..."]]:
    """The exponential moving average of the weights after `step` (counted from 0).

    The decay starts low, (1 + step) / (10 + step), so that the average of a short run is not its initial weights.
    """
    step = step.astype(jnp.float32)
    rate = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda a, p: a + (1.0 - rate) * (p.astype(a.dtype) - a), average, params)
