"""Balancing experts without an auxiliary loss, and figures that show how balanced they are (report section 2.1.2).

After each step every expert's selection bias moves by gamma: down where the expert was overloaded, up where it was
underloaded. Loads are counted over the whole global batch. This is neither a gradient nor the optimizer's concern.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def update_biases(
    biases: Float[Array, "layers E"], load: Int[Array, "layers E"], speed: Float[Array, ""] | float
) -> Float[Array, "layers E"]:
    """b_i + gamma sign(mean(c) - c_i), exactly.

    Args:
      biases: float32.
      load: int32 assignments of the whole batch: every micro-batch, every device. Their sum over the experts of a
        layer must stay under 2^31.
      speed: gamma.

    Integer arithmetic throughout: the sign of a difference of rounded means would depend on how the batch was cut.
    """
    experts = load.shape[-1]
    total = jnp.sum(load, axis=-1, keepdims=True)
    whole, rest = total // experts, total % experts
    # mean = whole + rest / experts with 0 <= rest / experts < 1.
    sign = jnp.where(load == whole, jnp.sign(rest), jnp.sign(whole - load))
    return biases + jnp.asarray(speed, jnp.float32) * sign.astype(jnp.float32)


def max_violation(load: Int[Array, "layers E"]) -> Float[Array, " layers"]:
    """MaxVio: the largest load over the mean, less one; 0 is even."""
    load = jnp.asarray(load, jnp.float32)
    return jnp.max(load, axis=-1) / jnp.maximum(jnp.mean(load, axis=-1), 1e-9) - 1.0


def load_entropy(load: Int[Array, "layers E"]) -> Float[Array, " layers"]:
    """Entropy of the load distribution over its largest value, log E; 1 is even."""
    load = jnp.asarray(load, jnp.float32)
    share = load / jnp.maximum(jnp.sum(load, axis=-1, keepdims=True), 1.0)
    entropy = -jnp.sum(jnp.where(share > 0, share * jnp.log(jnp.maximum(share, 1e-30)), 0.0), axis=-1)
    return entropy / jnp.log(float(load.shape[-1]))


def dead_experts(load: Int[Array, "layers E"]) -> Int[Array, ""]:
    """How many experts, over all layers, received no token at all."""
    return jnp.sum(load == 0)
