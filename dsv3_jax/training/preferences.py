"""A reward model's loss on preference pairs (Bradley and Terry 1952): -log sigmoid(r(chosen) - r(rejected)).

The score r of a text is the logit of token 0 after its last token: row 0 of the output head is the reward head. So a
reward model is a model like any other, in folders, checkpoints, exports and on meshes. (Token 0 begins a text in the
published tokenizers and is a zero byte in this project's, so that no text needs its logit.)

A row of pairs is `tokens` and `segment_ids` [T + 1] as ever. Segments 1 and 2 are the chosen and the rejected text of
the first pair, 3 and 4 those of the second, and so on. The last token of a row is padding.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.model import DeepSeekV3
from dsv3_jax.training.config import Balance
from dsv3_jax.training.losses import BatchTargets, LossTerms, LossWeights, balance_of, share_of
from dsv3_jax.training.qk_clip import LargestLogits

REWARD_TOKEN = 0
"""The token whose logit is the score of a text."""


def scores(model: DeepSeekV3, hidden: Float[Array, "*N d"]) -> Float[Array, "*N"]:
    """Returns the score of a text that ends at each position, float32.

    Args:
      hidden: hidden states before the output head.
    """
    row = model.head.weight[...][REWARD_TOKEN].astype(jnp.float32)
    return jnp.einsum("...d,d->...", hidden.astype(jnp.float32), row, precision="highest")


def differences(
    model: DeepSeekV3, hidden: Float[Array, "B T d"], segment_ids: Int[Array, "B T1"]
) -> tuple[Float[Array, "B P"], Bool[Array, "B P"]]:
    """Returns r(chosen) - r(rejected) of every pair in a row, and which of the P pairs there are."""
    ids = jnp.abs(segment_ids)
    ends = (ids[:, :-1] != ids[:, 1:]) & (ids[:, :-1] > 0)
    sign = jnp.where(ids[:, :-1] % 2 == 1, 1.0, -1.0)
    pair = (ids[:, :-1] - 1) // 2  # -1 for padding, which belongs to no pair
    pairs = ids.shape[1] // 2

    def of_row(values: Float[Array, " T"], pair: Int[Array, " T"]) -> Float[Array, " P"]:
        return jax.ops.segment_sum(values, pair, num_segments=pairs)

    margins = jax.vmap(of_row)(jnp.where(ends, sign * scores(model, hidden), 0.0), pair)
    return margins, jnp.arange(pairs) < jnp.max(ids, axis=1, keepdims=True) // 2


def pair_losses(margins: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """Returns -log sigmoid(margin), in nats."""
    return jax.nn.softplus(-margins)


def count_pairs(segment_ids: Int[Array, "A B T1"]) -> BatchTargets:
    """Counts the tokens and the pairs of a batch; a count of zero is replaced by one."""
    pairs = jnp.sum(jnp.max(jnp.abs(segment_ids), axis=-1) // 2)
    real, pairs = (jnp.maximum(n, 1).astype(jnp.float32) for n in (jnp.sum(segment_ids[..., 1:] != 0), pairs))
    return BatchTargets(real, pairs[None])


def preference_objective(
    model: DeepSeekV3,
    tokens: Int[Array, "B T1"],
    segment_ids: Int[Array, "B T1"],
    *,
    weights: LossWeights,
    targets: BatchTargets,
    balance: Balance,
    measure_logits: bool = False,
) -> LossTerms:
    """Returns the loss of one pass over preference pairs; arguments as of `losses.objective`.

    MTP modules are not trained.
    """
    features = model.features(tokens[:, :-1], segment_ids=segment_ids[:, :-1], measure_logits=measure_logits)
    margins, counted = differences(model, features.hidden, segment_ids)
    main = jnp.sum(pair_losses(margins) * counted) / targets.divisors[0]
    routing, largest = features.routing, features.largest_logits
    balance_term = share_of(segment_ids, targets) * balance_of(routing, balance)
    return LossTerms(
        total=main + weights.balance * balance_term,
        main=main,
        mtp=jnp.zeros((0,)),
        balance=balance_term,
        load=routing.load if routing is not None else jnp.zeros((0, 1), jnp.int32),
        largest_logits=None if largest is None else LargestLogits(largest),
    )
