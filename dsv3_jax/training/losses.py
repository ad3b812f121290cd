"""The training objective: cross-entropy, multi-token prediction (report Eq. 24-25) and expert balance.

    L^k_MTP = -1/T sum_i log P^k_i[t_i]       (24)
    L_MTP   = lambda / D sum_k L^k_MTP        (25)
    L       = L_main + L_MTP + L_Bal

The balance loss L_Bal (Eq. 17-20) is described in `dsv3_jax.modules.balance`; here it is weighted by alpha.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.model import DeepSeekV3
from dsv3_jax.modules.balance import Routing
from dsv3_jax.modules.embedding import Head
from dsv3_jax.training.config import Balance
from dsv3_jax.training.qk_clip import LargestLogits
from pallas_kernels.device import target_platform


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossWeights:
    """Weights of the terms that are added to the main cross-entropy.

    Attributes:
      balance: alpha.
      mtp: lambda.
    """

    balance: Float[Array, ""]
    mtp: Float[Array, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BatchTargets:
    """The numbers of targets of a whole batch, all its passes together.

    Attributes:
      real: tokens to predict that are not padding, those that no loss counts included.
      divisors: what the sums of the cross-entropies of the main head and of every MTP depth are divided by.
    """

    real: Float[Array, ""]
    divisors: Float[Array, " D1"]

    @classmethod
    def count(cls, segment_ids: Int[Array, "*A B T1"], depths: int, *, isolate_segments: bool) -> BatchTargets:
        """Counts the targets of a batch; a count of zero is replaced by one.

        The divisor is the number of targets of the main head at every depth, as Eq. 24 divides a sum of T-k terms by T.
        Where targets stay inside a segment each depth is divided by the number of its own: segments may be so short
        that few of the targets of the main head count.

        Args:
          depths: number of MTP depths.
        """
        real = jnp.sum(segment_ids[..., 1:] != 0)
        counts = [jnp.sum(is_target(segment_ids, 1, isolate_segments=False))] * (depths + 1)
        if isolate_segments:
            counts = [jnp.sum(is_target(segment_ids, k, isolate_segments=True)) for k in range(1, depths + 2)]
        real, divisors = (jnp.maximum(count, 1).astype(jnp.float32) for count in (real, jnp.stack(counts)))
        return cls(real, divisors)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossTerms:
    """Terms of the objective over one pass, in nats.

    Attributes:
      total: the loss that is differentiated.
      main: cross-entropy of the main head, summed and divided by `BatchTargets.divisors`.
      mtp: the same of each depth (Eq. 24).
      balance: unweighted balance term, summed over layers.
      load: int32, assignments to each expert of each layer.
      largest_logits: of the attention; None where not asked for.
      distillation: divergence from the teacher, summed and divided as `main` is; None without a teacher.
    """

    total: Float[Array, ""]
    main: Float[Array, ""]
    mtp: Float[Array, " D"]
    balance: Float[Array, ""]
    load: Int[Array, "layers E"]
    largest_logits: LargestLogits | None = None
    distillation: Float[Array, ""] | None = None


def is_target(segment_ids: Int[Array, "*B T1"], ahead: int, *, isolate_segments: bool) -> Bool[Array, "*B T1-ahead"]:
    """Returns True where the token `ahead` positions later is a target.

    Its segment id is positive (neither padding nor read only) and, if asked, it is of the same segment.
    """
    targets = segment_ids[..., ahead:]
    counted = targets > 0
    return counted & (targets == jnp.abs(segment_ids[..., :-ahead])) if isolate_segments else counted


def target_weights(
    segment_ids: Int[Array, "*B T1"], ahead: int, *, isolate_segments: bool
) -> Float[Array, "*B T1-ahead"]:
    """Returns 1 where `is_target` is True, else 0."""
    return is_target(segment_ids, ahead, isolate_segments=isolate_segments).astype(jnp.float32)


def cross_entropies(
    head: Head,
    hidden: Float[Array, "B T d"],
    targets: Int[Array, "B T"],
    chunk: int,
    *,
    rows_over: str | None = None,
) -> Float[Array, "B T"]:
    """Returns -log P(target) of every position in float32, computing the logits of about `chunk` tokens at a time.

    Args:
      rows_over: a mesh axis, manual in this program, each of whose ranks has equally many rows of the head in order.
        Rows after the last one of the vocabulary are left out.
    """

    def of(hidden: Float[Array, "*N d"], targets: Int[Array, "*N"]) -> Float[Array, "*N"]:
        logits = head(hidden)
        if rows_over is None:
            return cross_entropy(logits, targets)
        rows, vocabulary = logits.shape[-1], head.shape.shape[0]
        first = lax.axis_index(rows_over) * rows
        logits = jnp.where(first + jnp.arange(rows) < vocabulary, logits, -jnp.inf)
        return cross_entropy(logits, targets - first, rows_over)

    return in_pieces(of, hidden, targets, chunk, head.devices.context_ranks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def cross_entropy(
    logits: Float[Array, "*N V"], targets: Int[Array, "*N"], columns_over: str | None = None
) -> Float[Array, "*N"]:
    """Returns -log P(target) of every token from its logits.

    Args:
      columns_over: a mesh axis of which each rank has some columns of the logits; `targets` count from the first of a
        rank's own, and are on another rank if they are outside. The gradient is that of the rank's own columns.
    """
    return _cross_entropy_forward(logits, targets, columns_over)[0]


def _cross_entropy_forward(logits, targets, columns_over):
    log_sum = jax.nn.logsumexp(logits, axis=-1)
    if columns_over is None and target_platform() == "cpu":
        at_target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    else:  # one comparison per column, because columns may be on several devices
        at_target = jnp.sum(jnp.where(targets[..., None] == jnp.arange(logits.shape[-1]), logits, 0.0), axis=-1)
    if columns_over is not None:
        log_sum = jax.nn.logsumexp(lax.all_gather(log_sum, columns_over), axis=0)
        at_target = lax.psum(at_target, columns_over)
    return log_sum - at_target, (logits, targets, log_sum)


def _cross_entropy_backward(columns_over, residuals, bar):
    """Returns the gradient to the logits, bar * (P - 1(target)), in one pass over them."""
    logits, targets, log_sum = residuals
    is_target = targets[..., None] == jnp.arange(logits.shape[-1])
    probability = jnp.exp(logits - log_sum[..., None])
    return (probability - is_target.astype(logits.dtype)) * bar[..., None], None


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def in_pieces[Values](
    of: Callable[[Float[Array, "*N d"], Int[Array, "*N"]], Values],
    hidden: Float[Array, "B T d"],
    targets: Int[Array, "B T"],
    chunk: int,
    parts: int,
) -> Values:
    """Returns of(hidden, targets), whose arrays have the shape of `targets`, computed for `chunk` tokens at a time.

    Each piece is a range of positions of all sequences, in each of the `parts` into which a mesh divides a sequence, so
    that every device takes part in each piece. The backward pass computes each piece again.
    """
    rows, length = targets.shape
    pieces = min(-(-rows * length // chunk), -(-length // parts))
    if pieces == parts == 1:
        values = of(hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1))
        return jax.tree.map(lambda value: value.reshape(targets.shape), values)
    of_a_part = -(-length // parts)
    size = -(-of_a_part // pieces)
    pieces = -(-of_a_part // size)

    def split(x: Array) -> Array:
        """Returns [pieces, B, parts, size, ...], padded behind the sequence and behind each part."""
        others = [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, ((0, 0), (0, parts * of_a_part - length), *others)).reshape(rows, parts, of_a_part, *x.shape[2:])
        x = jnp.pad(x, ((0, 0), (0, 0), (0, pieces * size - of_a_part), *others))
        return jnp.moveaxis(x.reshape(rows, parts, pieces, size, *x.shape[3:]), 2, 0)

    def join(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 2).reshape(rows, parts, pieces * size)[:, :, :of_a_part]
        return x.reshape(rows, -1)[:, :length]

    by_piece = (split(hidden), split(targets))
    if pieces == 1:
        values = jax.tree.map(lambda value: value[None], of(by_piece[0][0], by_piece[1][0]))
    else:
        values = lax.map(jax.checkpoint(lambda pair: of(*pair)), by_piece)
    return jax.tree.map(join, values)


def objective(
    model: DeepSeekV3,
    tokens: Int[Array, "B T1"],
    segment_ids: Int[Array, "B T1"],
    *,
    weights: LossWeights,
    targets: BatchTargets,
    balance: Balance,
    isolate_segments: bool,
    chunk: int,
    measure_logits: bool = False,
    teacher_weight: float = 0.0,
    divergences: Callable[[Float[Array, "B T d"]], Float[Array, "B T"]] | None = None,
) -> LossTerms:
    """Returns the loss of one pass and its terms.

    Args:
      tokens, segment_ids: int32, T+1 tokens per row: inputs are the first T, targets the last T. Segment 0 is padding;
        tokens with a negative id are no targets (`modules.segments`).
      weights: alpha and lambda.
      targets: the numbers of targets of the whole batch, by which sums are divided.
      balance: which balance term is used.
      isolate_segments: whether attention and targets stay inside a segment.
      chunk: about how many tokens' logits are held at a time.
      measure_logits: whether to return the largest attention logits.
      teacher_weight: weight of the divergence from a teacher in the main loss, to which the cross-entropy has the rest.
      divergences: returns each position's divergence from the teacher, given the hidden states of the main head.
    """
    features = model.features(
        tokens[:, :-1],
        segment_ids=segment_ids[:, :-1],
        isolate_segments=isolate_segments,
        measure_logits=measure_logits,
    )
    main, mtp = prediction_losses(
        model.head,
        (features.hidden, *features.mtp_hidden),
        tokens,
        segment_ids,
        targets=targets,
        isolate_segments=isolate_segments,
        chunk=chunk,
    )
    balance_term = share_of(segment_ids, targets) * balance_of(features.routing, balance)
    load = features.routing.load if features.routing is not None else jnp.zeros((0, 1), jnp.int32)
    distilled, learned = None, main
    if divergences is not None:
        counted = target_weights(segment_ids, 1, isolate_segments=isolate_segments)
        distilled = jnp.sum(divergences(features.hidden) * counted) / targets.divisors[0]
        learned = (1 - teacher_weight) * main + teacher_weight * distilled
    total = total_loss(learned, mtp, balance_term, weights)
    largest = None if features.largest_logits is None else LargestLogits(features.largest_logits)
    return LossTerms(total, main, mtp, balance_term, load, largest, distilled)


def prediction_losses(
    head: Head,
    hidden: tuple[Float[Array, "B _ d"], ...],
    tokens: Int[Array, "B T1"],
    segment_ids: Int[Array, "B T1"],
    *,
    targets: BatchTargets,
    isolate_segments: bool,
    chunk: int,
    rows_over: str | None = None,
) -> tuple[Float[Array, ""], Float[Array, " D"]]:
    """Returns the cross-entropy of the main head, and L^k_MTP of every depth (Eq. 24).

    Args:
      hidden: hidden states of the main head, then of each depth.
      rows_over: as for `cross_entropies`; the others as for `objective`.
    """
    losses = []
    for k, (states, divisor) in enumerate(zip(hidden, targets.divisors, strict=True), start=1):
        each = cross_entropies(head, states, tokens[:, k:], chunk, rows_over=rows_over)
        counted = target_weights(segment_ids, k, isolate_segments=isolate_segments)
        losses.append(jnp.sum(each * counted) / divisor)
    return losses[0], jnp.stack(losses[1:]) if losses[1:] else jnp.zeros((0,))


def share_of(segment_ids: Int[Array, "B T1"], targets: BatchTargets) -> Float[Array, ""]:
    """Returns a pass's share of the batch, with which balance terms, which are means over a pass, are averaged."""
    return jnp.sum(segment_ids[:, 1:] != 0) / targets.real


def mtp_loss(mtp: Float[Array, " D"], weight: Float[Array, ""]) -> Float[Array, ""]:
    """Returns L_MTP (Eq. 25): lambda times the mean over the MTP depths; zero without any."""
    return weight / max(mtp.shape[0], 1) * jnp.sum(mtp)


def total_loss(
    main: Float[Array, ""], mtp: Float[Array, " D"], balance: Float[Array, ""], weights: LossWeights
) -> Float[Array, ""]:
    """Returns L: the main loss, L_MTP, and alpha times the balance term."""
    return main + mtp_loss(mtp, weights.mtp) + weights.balance * balance


def balance_of(routing: Routing | None, balance: Balance) -> Float[Array, ""]:
    """Returns the balance term summed over layers: per sequence (Eq. 17), of the pass (section 4.5.3), or zero."""
    if routing is None or balance == "none":
        return jnp.zeros(())
    return jnp.sum(routing.sequence_balance if balance == "sequence" else routing.batch_balance)
