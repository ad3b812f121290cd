"""Balance of the experts' load: the balance loss (report Eq. 17-20), the bias rule of section 2.1.2, and its measures.

    L_Bal = alpha sum_i f_i P_i                                                     (17)
    f_i   = N_r / (K_r T) sum_t 1(s_{i,t} is among the K_r largest of token t)      (18)
    s'    = s / sum_j s_{j,t}                                                       (19)
    P_i   = 1 / T sum_t s'_{i,t}                                                    (20)

f_i and P_i of every sequence are computed together with the selection they describe, by `pallas_kernels.gate` (its
definition is `pallas_kernels/routing/reference.py`). `balance_terms` forms the sum of Eq. 17, and the training
objective multiplies it by alpha. `update_biases` is the auxiliary-loss-free rule.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """Load and balance of the experts in a forward pass; in a model's output every field is stacked over its layers.

    Attributes:
      load: int32, assignments of real (not padding) tokens to each expert.
      sequence_balance: float32, sum_i f_i P_i averaged over sequences: 1 when even, at most about E/K;
        differentiable through P.
      batch_balance: the same with f and P taken over all sequences of the pass (section 4.5.3).
    """

    load: Int[Array, "*layers E"]
    sequence_balance: Float[Array, "*layers"]
    batch_balance: Float[Array, "*layers"]

    @classmethod
    def join(cls, parts: list[Routing]) -> Routing:
        """Concatenates parts that each have a leading layer axis."""
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def balance_terms(
    f: Float[Array, "B E"],
    P: Float[Array, "B E"],
    token_mask: Float[Array, "B T"] | None,
    *,
    sum_over_batch: Callable[[Array], Array],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the sequence-wise and the batch-wise sum_i f_i P_i (Eq. 17), sequences weighted by their real tokens.

    Args:
      f, P: Eq. 18 and 20 of each sequence.
      token_mask: True at real tokens; None when all are.
      sum_over_batch: turns a sum over these sequences into the sum over the batch (`Devices.sum_over_batch`).
    """
    if token_mask is None:
        counts = jnp.ones(f.shape[0])
    else:
        counts = jnp.sum(token_mask, axis=-1).astype(jnp.float32)
    weights = counts / jnp.maximum(sum_over_batch(jnp.sum(counts)), 1.0)
    by_sequence = jnp.sum(f * P, axis=-1)
    sequence_wise = sum_over_batch(jnp.sum(weights * by_sequence))
    fraction, affinity = (sum_over_batch(jnp.sum(weights[:, None] * values, axis=0)) for values in (f, P))
    return sequence_wise, jnp.sum(fraction * affinity)


def update_biases(
    biases: Float[Array, "layers E"], load: Int[Array, "layers E"], speed: Float[Array, ""] | float
) -> Float[Array, "layers E"]:
    """Returns b_i + gamma sign(mean(c) - c_i): overloaded experts go down, underloaded ones up, others stay.

    Args:
      load: c, int32 assignments over the whole global batch of the step; a layer's sum stays under 2^31.
      speed: gamma.
    """
    experts = load.shape[-1]
    total = jnp.sum(load, axis=-1, keepdims=True)
    # mean(c) = whole + rest / E. (sum(c) - E c_i would leave int32 at the report's batch for an overloaded expert.)
    whole, rest = total // experts, total % experts
    sign = jnp.where(load == whole, jnp.sign(rest), jnp.sign(whole - load))
    return biases + speed * sign.astype(biases.dtype)


def max_violation(load: Int[Array, "*layers E"]) -> Float[Array, "*layers"]:
    """Returns MaxVio, the largest load over the mean load, minus one: 0 when the load is even."""
    mean = jnp.maximum(jnp.mean(load.astype(jnp.float32), axis=-1), 1e-9)
    return jnp.max(load, axis=-1) / mean - 1.0


def dead_experts(load: Int[Array, "*layers E"]) -> Int[Array, "*layers"]:
    """Returns how many experts no token reached."""
    return jnp.sum(load == 0, axis=-1)
