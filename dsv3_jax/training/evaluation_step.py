"""One evaluation pass over a batch, as a pure function."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dsv3_jax.training.config import RunConfig
from dsv3_jax.training.losses import cross_entropy, in_pieces, target_weights
from dsv3_jax.training.preferences import differences, pair_losses
from dsv3_jax.training.state import Skeleton
from dsv3_jax.training.state_layout import StateLayout


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EvaluationSums:
    """Sums over one evaluation pass; index 0 is the main head, index k the MTP head of depth k.

    Of preference pairs there is index 0 only: `nats` are the losses of the pairs, `targets` is their number, `bytes` is
    0, and `accepted` is the number of pairs whose chosen answer has the higher score.

    Attributes:
      nats: negative log-likelihood of the targets.
      targets: number of targets.
      bytes: number of bytes of text that the targets stand for.
      accepted: number of targets of depth k for which the MTP head's most likely token is also that of the main head,
        which sees k tokens more. Greedy self-speculation accepts these drafts.
    """

    nats: Float[Array, " D1"]
    targets: Float[Array, " D1"]
    bytes: Float[Array, " D1"]
    accepted: Float[Array, " D1"]


def make_evaluation_step(
    skeleton: Skeleton, config: RunConfig, layout: StateLayout | None = None
) -> Callable[..., EvaluationSums]:
    """Returns the jitted pass: (params, biases, tokens [B, T+1], segment_ids, bytes of each token id [V]) -> sums."""
    layout = layout or StateLayout()
    isolate = config.data.isolate_documents
    chunk = config.training.loss_chunk * layout.token_ranks
    if config.data.form == "preferences":
        return _make_pair_evaluation(skeleton, layout)

    @jax.jit
    def evaluate(
        params: nnx.State,
        biases: Float[Array, "layers E"],
        tokens: Int[Array, "B T1"],
        segment_ids: Int[Array, "B T1"],
        token_bytes: Int[Array, " V"],
    ) -> EvaluationSums:
        model = skeleton.model(params, biases)
        features = model.features(tokens[:, :-1], segment_ids=segment_ids[:, :-1], isolate_segments=isolate)

        def of(hidden: Float[Array, "*N d"], targets: Int[Array, "*N"]) -> tuple[Float[Array, "*N"], Int[Array, "*N"]]:
            logits = model.head(hidden)
            return cross_entropy(logits, targets), jnp.argmax(logits, axis=-1)

        sums, choices = [], []
        for k, hidden in enumerate((features.hidden, *features.mtp_hidden)):
            targets = tokens[:, k + 1 :]
            counted = target_weights(segment_ids, k + 1, isolate_segments=isolate)
            losses, choice = in_pieces(of, hidden, targets, chunk, model.devices.context_ranks)
            choices.append(choice)
            agrees = choice == choices[0][:, k:]
            parts = (losses, jnp.ones_like(losses), token_bytes[targets], agrees)
            sums.append([jnp.sum(part * counted) for part in parts])
        return layout.replicate(EvaluationSums(*(jnp.stack(column) for column in zip(*sums, strict=True))))

    return evaluate


def _make_pair_evaluation(skeleton: Skeleton, layout: StateLayout) -> Callable[..., EvaluationSums]:
    @jax.jit
    def evaluate(
        params: nnx.State,
        biases: Float[Array, "layers E"],
        tokens: Int[Array, "B T1"],
        segment_ids: Int[Array, "B T1"],
        token_bytes: Int[Array, " V"],
    ) -> EvaluationSums:
        del token_bytes
        model = skeleton.model(params, biases)
        hidden = model.features(tokens[:, :-1], segment_ids=segment_ids[:, :-1]).hidden
        margins, counted = differences(model, hidden, segment_ids)
        parts = (pair_losses(margins), counted, jnp.zeros(()), margins > 0)
        return layout.replicate(EvaluationSums(*(jnp.sum(part * counted)[None] for part in parts)))

    return evaluate
