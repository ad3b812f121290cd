"""What a forward pass reports of its routing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """Expert load and balance of MoE layers; in a model's output every field is stacked over its layers.

    Attributes:
      load: assignments of real (not padding) tokens to each expert.
      sequence_balance: sum_i f_i P_i of Eq. 17-20, averaged over sequences: 1 when even, at most about E/K;
        differentiable through P. The balance loss is alpha times this, summed over layers.
      batch_balance: the same with f and P taken over the whole batch (section 4.5.3).
    """

    load: Int[Array, "*layers E"]
    sequence_balance: Float[Array, "*layers"]
    batch_balance: Float[Array, "*layers"]

    @classmethod
    def join(cls, parts: list[Routing]) -> Routing:
        """Concatenates parts that each have a leading layer axis."""
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def whole_batch(sums: Array) -> Array:
    """Sums over the sequences at hand, where these are the batch."""
    return sums


def balance_terms(
    selection_fraction: Float[Array, "B E"],
    affinity_mean: Float[Array, "B E"],
    token_mask: Float[Array, "B T"] | None,
    *,
    over_ranks: Callable[[Array], Array] = whole_batch,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The sequence-wise and the batch-wise sum of f_i P_i (Eq. 17), sequences weighted by their real tokens.

    Args:
      selection_fraction: f_i a sequence.
      affinity_mean: P_i a sequence.
      token_mask: True at real tokens; None when all are.
      over_ranks: what makes of a sum over these sequences the sum over the batch.
    """
    if token_mask is None:
        counts = jnp.ones(selection_fraction.shape[0])
    else:
        counts = jnp.sum(token_mask, axis=-1).astype(jnp.float32)
    weights = counts / jnp.maximum(over_ranks(jnp.sum(counts)), 1.0)
    by_sequence = jnp.sum(selection_fraction * affinity_mean, axis=-1)
    sequence_wise = over_ranks(jnp.sum(weights * by_sequence))
    fraction, affinity = (
        over_ranks(jnp.sum(weights[:, None] * values, axis=0)) for values in (selection_fraction, affinity_mean)
    )
    return sequence_wise, jnp.sum(fraction * affinity)
