"""Auxiliary-loss-free load balancing (report section 2.1.2), and the figures by which balance is watched."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def update_biases(
    biases: Float[Array, "layers E"], load: Int[Array, "layers E"], speed: Float[Array, ""] | float
) -> Float[Array, "layers E"]:
    """b_i + gamma sign(mean(c) - c_i): overloaded experts down, underloaded up, equal ones unchanged.

    Args:
      load: c, assignments over the whole global batch of the step, as exact integers; a layer's sum stays under 2^31.
      speed: gamma.
    """
    experts = load.shape[-1]
    total = jnp.sum(load, axis=-1, keepdims=True)
    # mean(c) = whole + rest / E. (sum(c) - E c_i would leave int32 at the report's batch for an overloaded expert.)
    whole, rest = total // experts, total % experts
    sign = jnp.where(load == whole, jnp.sign(rest), jnp.sign(whole - load))
    return biases + speed * sign.astype(biases.dtype)


def max_violation(load: Int[Array, "*layers E"]) -> Float[Array, "*layers"]:
    """MaxVio: the largest load over the mean, less one. 0 is even."""
    mean = jnp.maximum(jnp.mean(load.astype(jnp.float32), axis=-1), 1e-9)
    return jnp.max(load, axis=-1) / mean - 1.0


def dead_experts(load: Int[Array, "*layers E"]) -> Int[Array, "*layers"]:
    """Experts that no token reached."""
    return jnp.sum(load == 0, axis=-1)
