"""The training losses: next token, multi-token prediction, expert balance (report sections 2.1.2, 2.2, 4.5.3).

Logits are made for a few positions at a time and never all held: at 129,280 words they would outweigh everything
else. The gradient with respect to logits is known in closed form (softmax less one-hot), so each piece is
differentiated on the way forward and no logits are computed twice.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from dsv3_jax.model import DeepSeekV3, Features

BalanceLoss = Literal["sequence", "batch", "none"]
"""sequence: Eq. 17-20, balance within each sequence.  batch: the same over each micro-batch (section 4.5.3's
batch-wise auxiliary loss).  none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What the loss is made of; its weights change with time and are in `schedules`.

    Attributes:
      balance: which balance loss.
      isolate_segments: attention stays inside each document of a packed row, and no loss is taken across the end of
        one. The report does without in pre-training.
      chunk_tokens: positions whose logits are held at one time, at most (and at least one per sequence).
    """

    balance: BalanceLoss = "sequence"
    isolate_segments: bool = False
    chunk_tokens: int = 4096


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Losses:
    """Losses of one micro-batch as its share of the whole batch's: they add up over micro-batches.

    Attributes:
      total: what is differentiated.
      main: mean cross-entropy of the next token, nats.
      mtp: L_MTP^k of Eq. 24 for each depth k, nats.
      balance: sum over MoE layers of sum_i f_i P_i, before the weight alpha; 1 a layer when even.
    """

    total: Float[Array, ""]
    main: Float[Array, ""]
    mtp: Float[Array, " D"]
    balance: Float[Array, ""]


def target_weights(
    segment_ids: Int[Array, "B T+1"], depth: int = 0, *, isolate_segments: bool = False
) -> Float[Array, "B T-k"]:
    """1 where input position i has token i+depth+1 to predict, else 0: padding (id 0) neither predicts nor is
    predicted, and with `isolate_segments` both must lie in one document."""
    source = segment_ids[:, : segment_ids.shape[1] - 1 - depth]
    target = segment_ids[:, 1 + depth :]
    wanted = (source != 0) & (target != 0)
    if isolate_segments:
        wanted &= source == target
    return wanted.astype(jnp.float32)


def micro_batch_losses(
    model: DeepSeekV3,
    tokens: Int[Array, "B T+1"],
    segment_ids: Int[Array, "B T+1"],
    *,
    config: LossConfig,
    target_count: Float[Array, ""],
    token_count: Float[Array, ""],
    mtp_weight: Float[Array, ""] | float,
    balance_weight: Float[Array, ""] | float,
) -> tuple[Losses, Features]:
    """Losses of one micro-batch, and the features they came from.

    Args:
      target_count: main targets of the whole batch. MTP's T-k terms are divided by the same T (Eq. 24).
      token_count: real input tokens of the whole batch, which weigh micro-batches in the balance loss.
      mtp_weight: lambda, divided among the depths (Eq. 25).   balance_weight: alpha.
    """
    features = model.features(
        tokens[:, :-1], segment_ids=segment_ids[:, :-1], isolate_segments=config.isolate_segments
    )
    nll = functools.partial(_head_nll, model, tokens, segment_ids, config)
    main = nll(features.hidden, 0) / target_count
    mtp = [nll(hidden, k) / target_count for k, hidden in enumerate(features.mtp_hidden, start=1)]
    mtp_losses = jnp.stack(mtp) if mtp else jnp.zeros((0,), jnp.float32)
    balance = jnp.zeros((), jnp.float32)
    if features.routing is not None and config.balance != "none":
        per_layer = getattr(features.routing, f"{config.balance}_balance")
        share = jnp.sum(segment_ids[:, :-1] != 0) / token_count
        balance = share * jnp.sum(per_layer)
    total = main + balance_weight * balance
    if mtp:
        total += mtp_weight / len(mtp) * jnp.sum(mtp_losses)
    return Losses(total, main, mtp_losses, balance), features


def _head_nll(
    model: DeepSeekV3,
    tokens: Int[Array, "B T+1"],
    segment_ids: Int[Array, "B T+1"],
    config: LossConfig,
    hidden: Float[Array, "B T-k d"],
    depth: int,
) -> Float[Array, ""]:
    """Sum of -log P of token i+depth+1 over positions i that have one."""
    weights = target_weights(segment_ids, depth, isolate_segments=config.isolate_segments)
    return negative_log_likelihood(model.head, hidden, tokens[:, 1 + depth :], weights, chunk_tokens=config.chunk_tokens)


def negative_log_likelihood(
    head: nnx.Module,
    hidden: Float[Array, "B T d"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    chunk_tokens: int,
) -> Float[Array, ""]:
    """Sum over positions of -weight log softmax(head(hidden))[target], nats, float32.

    Differentiable with respect to the head's parameters and `hidden`; `weights` count as constants.
    """
    batch, length, _ = hidden.shape
    width = max(1, min(length, chunk_tokens // batch))
    graph, parameters = nnx.split(head)
    pieces = -(-length // width)
    padding = pieces * width - length

    def cut(x: Array) -> Array:
        """[B, T, ...] -> [pieces, B, width, ...]; a chunk spans all rows, so that it stays spread over devices."""
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, pieces, width, *x.shape[2:]), 1, 0)

    return _chunked_nll(graph, parameters, cut(hidden), cut(targets), cut(weights))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked_nll(
    graph: Any,
    parameters: Any,
    hidden: Float[Array, "n B c d"],
    targets: Int[Array, "n B c"],
    weights: Float[Array, "n B c"],
) -> Float[Array, ""]:
    def chunk(total: Float[Array, ""], xs: tuple[Array, Array, Array]) -> tuple[Float[Array, ""], None]:
        h, t, w = xs
        logits = nnx.merge(graph, parameters)(h)
        return total + _nll(logits, t, w)[0], None

    total, _ = lax.scan(chunk, jnp.zeros((), jnp.float32), (hidden, targets, weights))
    return total


def _nll(
    logits: Float[Array, "B c V"], targets: Int[Array, "B c"], weights: Float[Array, "B c"]
) -> tuple[Float[Array, ""], Float[Array, "B c 1"]]:
    """The weighted sum, and the log of the normaliser of each position."""
    log_normaliser = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)
    return jnp.sum((log_normaliser - picked)[..., 0] * weights), log_normaliser


def _chunked_nll_forward(
    graph: Any, parameters: Any, hidden: Array, targets: Array, weights: Array
) -> tuple[Float[Array, ""], tuple[Any, Array, Array]]:
    def chunk(carry: tuple[Array, Any], xs: tuple[Array, Array, Array]) -> tuple[tuple[Array, Any], Array]:
        total, parameter_gradient = carry
        h, t, w = xs
        logits, pull_back = jax.vjp(lambda p, x: nnx.merge(graph, p)(x), parameters, h)
        nll, log_normaliser = _nll(logits, t, w)
        is_target = lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == t[..., None]
        d_logits = (jnp.exp(logits - log_normaliser) - is_target) * w[..., None]
        d_parameters, d_hidden = pull_back(d_logits.astype(logits.dtype))
        return (total + nll, jax.tree.map(jnp.add, parameter_gradient, d_parameters)), d_hidden

    start = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, parameters))
    (total, parameter_gradient), d_hidden = lax.scan(chunk, start, (hidden, targets, weights))
    return total, (parameter_gradient, d_hidden, weights)


def _chunked_nll_backward(
    graph: Any, kept: tuple[Any, Array, Array], cotangent: Float[Array, ""]
) -> tuple[Any, Array, None, Array]:
    parameter_gradient, d_hidden, weights = kept
    scale = lambda x: (x * cotangent).astype(x.dtype)  # noqa: E731
    return jax.tree.map(scale, parameter_gradient), scale(d_hidden), None, jnp.zeros_like(weights)


_chunked_nll.defvjp(_chunked_nll_forward, _chunked_nll_backward)
