"""The training objective: cross-entropy, multi-token prediction and expert balance (report Eq. 17-25)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dsv3_jax.model import DeepSeekV3
from dsv3_jax.modules.routing_statistics import Routing
from dsv3_jax.training.config import Balance


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossWeights:
    """Weights of the terms beside the main cross-entropy: alpha and lambda."""

    balance: Float[Array, ""]
    mtp: Float[Array, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossTerms:
    """Terms of the objective over one pass, in nats.

    Attributes:
      total: what is differentiated.
      main: cross-entropy of the main head, summed and divided by `real_tokens`.
      mtp: one a depth: the sum over its T-k positions divided by `real_tokens`, as in Eq. 24.
      balance: unweighted balance term, summed over layers.
      load: assignments a layer and expert.
    """

    total: Float[Array, ""]
    main: Float[Array, ""]
    mtp: Float[Array, " D"]
    balance: Float[Array, ""]
    load: Int[Array, "layers E"]


def target_weights(
    segment_ids: Int[Array, "B T1"], ahead: int, *, isolate_segments: bool
) -> Float[Array, "B T1-ahead"]:
    """1 where the token `ahead` places on is a target: it is not padding and, where asked, of the same segment."""
    targets = segment_ids[:, ahead:]
    counted = targets != 0
    if isolate_segments:
        counted = counted & (targets == segment_ids[:, :-ahead])
    return counted.astype(jnp.float32)


def cross_entropies(
    model: DeepSeekV3, hidden: Float[Array, "B T d"], targets: Int[Array, "B T"], chunk: int
) -> Float[Array, "B T"]:
    """-log P(target) of every position, in float32, holding the logits of about `chunk` tokens at a time.

    The pieces are stretches of all the sequences, so that every device of a mesh, which has whole sequences, takes part
    in each.
    """

    def of(hidden: Float[Array, "*N d"], targets: Int[Array, "*N"]) -> Float[Array, "*N"]:
        logits = model.head(hidden)
        # A comparison a column instead of a gather: its gradient is a comparison too, not a scatter.
        at_target = jnp.where(targets[..., None] == jnp.arange(logits.shape[-1]), logits, 0.0)
        return jax.nn.logsumexp(logits, axis=-1) - jnp.sum(at_target, axis=-1)

    rows, length = targets.shape
    pieces = min(-(-rows * length // chunk), length)
    if pieces == 1:
        return of(hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)).reshape(targets.shape)
    size = -(-length // pieces)
    padding = -(-length // size) * size - length
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0))).reshape(rows, -1, size, hidden.shape[-1])
    targets = jnp.pad(targets, ((0, 0), (0, padding))).reshape(rows, -1, size)
    by_piece = (jnp.moveaxis(hidden, 1, 0), jnp.moveaxis(targets, 1, 0))
    losses = lax.map(jax.checkpoint(lambda pair: of(*pair)), by_piece)
    return jnp.moveaxis(losses, 0, 1).reshape(rows, -1)[:, :length]


def objective(
    model: DeepSeekV3,
    tokens: Int[Array, "B T1"],
    segment_ids: Int[Array, "B T1"],
    *,
    weights: LossWeights,
    real_tokens: Float[Array, ""],
    balance: Balance,
    isolate_segments: bool,
    chunk: int,
) -> LossTerms:
    """The loss of one pass.

    Args:
      tokens, segment_ids: T+1 tokens a row: inputs are the first T, targets the last T; segment 0 is padding.
      real_tokens: what sums are divided by: the targets of the whole batch, all its passes together.
    """
    inputs = tokens[:, :-1]
    features = model.features(inputs, segment_ids=segment_ids[:, :-1], isolate_segments=isolate_segments)
    main, mtp = prediction_losses(
        model,
        (features.hidden, *features.mtp_hidden),
        tokens,
        segment_ids,
        real_tokens=real_tokens,
        isolate_segments=isolate_segments,
        chunk=chunk,
    )
    balance_term = share_of(segment_ids, real_tokens) * balance_of(features.routing, balance)
    load = features.routing.load if features.routing is not None else jnp.zeros((0, 1), jnp.int32)
    total = weighted(main, mtp, balance_term, weights)
    return LossTerms(total=total, main=main, mtp=mtp, balance=balance_term, load=load)


def prediction_losses(
    model: DeepSeekV3,
    hidden: tuple[Float[Array, "B _ d"], ...],
    tokens: Int[Array, "B T1"],
    segment_ids: Int[Array, "B T1"],
    *,
    real_tokens: Float[Array, ""],
    isolate_segments: bool,
    chunk: int,
) -> tuple[Float[Array, ""], Float[Array, " D"]]:
    """Cross-entropy of the main head and of every MTP depth, from the hidden states of each, the main head's first."""
    losses = []
    for k, states in enumerate(hidden, start=1):
        each = cross_entropies(model, states, tokens[:, k:], chunk)
        counted = target_weights(segment_ids, k, isolate_segments=isolate_segments)
        losses.append(jnp.sum(each * counted) / real_tokens)
    return losses[0], jnp.stack(losses[1:]) if losses[1:] else jnp.zeros((0,))


def share_of(segment_ids: Int[Array, "B T1"], real_tokens: Float[Array, ""]) -> Float[Array, ""]:
    """A pass's share of the batch: balance statistics are means over a pass, and their sums over passes means again."""
    return jnp.sum(segment_ids[:, 1:] != 0) / real_tokens


def weighted(
    main: Float[Array, ""], mtp: Float[Array, " D"], balance: Float[Array, ""], weights: LossWeights
) -> Float[Array, ""]:
    """The total: the main loss, lambda times the mean over the MTP depths, alpha times the balance term."""
    return main + weights.mtp / max(mtp.shape[0], 1) * jnp.sum(mtp) + weights.balance * balance


def balance_of(routing: Routing | None, balance: Balance) -> Float[Array, ""]:
    """The balance term summed over layers: sequence-wise (Eq. 17), over the whole pass (section 4.5.3), or none."""
    if routing is None or balance == "none":
        return jnp.zeros(())
    return jnp.sum(routing.sequence_balance if balance == "sequence" else routing.batch_balance)
