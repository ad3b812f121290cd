"""Group relative policy optimization (report Eq. 26-28), whose loss needs no value model.

For a question q, G completions o_1 .. o_G are drawn from the old policy and rewarded with R_1 .. R_G.

    J      = 1/G sum_i ( min(r_i A_i, clip(r_i, 1-eps, 1+eps) A_i) - beta KL_i )          (26)
    r_i    = pi(o_i|q) / pi_old(o_i|q)
    KL_i   = pi_ref(o_i|q) / pi(o_i|q) - log(pi_ref(o_i|q) / pi(o_i|q)) - 1               (27)
    A_i    = (R_i - mean(R)) / std(R)                                                     (28)

The report writes the ratio of whole completions (`ratio="sequence"`). DeepSeekMath and later work, R1's training code
among it, take the ratio of every token (`ratio="token"`), sum a completion's tokens and divide as `per` says.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dsv3_jax.errors import ConfigError

Ratio = Literal["sequence", "token"]
Per = Literal["completion", "token", "longest"]


@dataclasses.dataclass(frozen=True)
class GRPOConfig:
    """Choices of the objective.

    Attributes:
      ratio: probability ratios of whole completions (Eq. 26) or of tokens.
      clip_below: eps on the side of ratios below 1.
      clip_above: eps on the side of ratios above 1.
      kl_weight: beta. R1-Zero used 0.001.
      divide_by_deviation: whether advantages are divided by the standard deviation of their group (Eq. 28).
      per: what sums over tokens are divided by, which decides how much a token of a long completion counts:
        "completion", its own length (DeepSeekMath); "token", the mean length of the batch's completions, so that all
        tokens count alike; "longest", the longest completion allowed, so that length is not rewarded or punished. The
        ratio of whole completions has no such choice.
      largest_correction: the weight of a token is multiplied by its probability under the old policy over that with
        which it was drawn, at most this; 0 turns the correction off.
      count_overlong: whether completions that were cut at the length limit have part in the loss.
    """

    ratio: Ratio = "token"
    clip_below: float = 0.2
    clip_above: float = 0.2
    kl_weight: float = 0.001
    divide_by_deviation: bool = True
    per: Per = "completion"
    largest_correction: float = 0.0
    count_overlong: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.clip_below <= 1 or not 0 < self.clip_above < float("inf"):
            raise ConfigError(
                f"clip_below must be in (0, 1] and clip_above above 0, not {self.clip_below} and {self.clip_above}"
            )
        for name in ("kl_weight", "largest_correction"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} must be a finite number of 0 or more, not {getattr(self, name)}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Completions:
    """N completions as the loss sees them; arrays of one number per token are padded on the right.

    Attributes:
      mask: True at the tokens that the policy drew.
      advantages: A_i.
      old: log-probability of each token under the policy before this update, computed as the loss computes its own;
        None where that policy is the one that is trained, as in the first update after completions were drawn.
      drawn: log-probability with which each token was drawn, as the engine computed it.
      reference: log-probability of each token under the reference model; None without one.
      overlong: True where the completion was cut at the length limit.
    """

    mask: Bool[Array, "N T"]
    advantages: Float[Array, " N"]
    old: Float[Array, "N T"] | None
    drawn: Float[Array, "N T"]
    reference: Float[Array, "N T"] | None
    overlong: Bool[Array, " N"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GRPOTerms:
    """Parts of the loss, each a sum over a pass divided by the batch's number of completions or tokens.

    Attributes:
      loss: -J, which is minimised.
      kl: KL_i, unweighted.
      clipped: share of the ratios whose gradient the clip stops.
      drawn_difference: mean of |old - drawn| over tokens: how far engine and trainer are apart, in nats.
    """

    loss: Float[Array, ""]
    kl: Float[Array, ""]
    clipped: Float[Array, ""]
    drawn_difference: Float[Array, ""]


def group_advantages(rewards: Float[Array, "Q G"], *, divide_by_deviation: bool = True) -> Float[Array, "Q G"]:
    """Returns A_i (Eq. 28) of the completions of each question; zeros where all rewards of a question are equal."""
    centred = rewards - jnp.mean(rewards, axis=1, keepdims=True)
    varied = jnp.any(rewards != rewards[:, :1], axis=1, keepdims=True)
    if not divide_by_deviation:
        return jnp.where(varied, centred, 0.0)
    deviation = jnp.sqrt(jnp.mean(jnp.square(centred), axis=1, keepdims=True))
    return jnp.where(varied, centred / jnp.where(varied, deviation, 1.0), 0.0)


def grpo_terms(
    log_probs: Float[Array, "N T"],
    completions: Completions,
    config: GRPOConfig,
    *,
    batch_completions: Float[Array, ""],
    batch_tokens: Float[Array, ""],
    longest: int,
) -> GRPOTerms:
    """Returns -J (Eq. 26) of one pass and its parts; the terms of the passes of a batch add up to those of the batch.

    Args:
      log_probs: of each token under the policy that is trained; gradients flow to these alone.
      batch_completions: the number of completions in the whole batch.
      batch_tokens: the number of their tokens.
      longest: the most tokens that a completion may have.
    """
    mask = completions.mask
    counted = mask if config.count_overlong else mask & ~completions.overlong[:, None]
    old = jax.lax.stop_gradient(log_probs) if completions.old is None else completions.old
    reference = log_probs if completions.reference is None else completions.reference
    change = jnp.where(counted, log_probs - old, 0.0)
    from_reference = jnp.where(counted, reference - log_probs, 0.0)
    if config.ratio == "sequence":
        weights = jnp.any(counted, axis=1, keepdims=True) / batch_completions
        change = jnp.sum(change, axis=1, keepdims=True)
        from_reference = jnp.sum(from_reference, axis=1, keepdims=True)
    else:
        weights = counted * _token_weight(mask, config.per, batch_completions, batch_tokens, longest)
    correction = _correction(old - completions.drawn, counted, config)
    ratio = jnp.exp(change)
    advantages = completions.advantages[:, None]
    within = jnp.clip(ratio, 1 - config.clip_below, 1 + config.clip_above)
    gain = jnp.minimum(ratio * advantages, within * advantages)
    kl = jnp.exp(from_reference) - from_reference - 1
    total_kl = jnp.sum(kl * weights)
    stopped = (ratio * advantages > within * advantages) & (advantages != 0)
    apart = jnp.abs(old - completions.drawn)
    return GRPOTerms(
        loss=config.kl_weight * total_kl - jnp.sum(gain * correction * weights),
        kl=total_kl,
        clipped=jnp.sum(stopped * weights),
        drawn_difference=jnp.sum(jnp.where(mask, apart, 0.0)) / batch_tokens,
    )


def _token_weight(
    mask: Bool[Array, "N T"],
    per: Per,
    batch_completions: Float[Array, ""],
    batch_tokens: Float[Array, ""],
    longest: int,
) -> Float[Array, "N _"]:
    """Returns what a token counts in J."""
    if per == "completion":
        return 1 / (batch_completions * jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1))
    if per == "token":
        return jnp.broadcast_to(1 / batch_tokens, (mask.shape[0], 1))
    return jnp.broadcast_to(1 / (batch_completions * longest), (mask.shape[0], 1))


def _correction(apart: Float[Array, "N T"], counted: Bool[Array, "N T"], config: GRPOConfig) -> Float[Array, "N _"]:
    """Returns the truncated importance weights pi_old / pi_drawn of tokens, or of completions; ones if turned off."""
    if not config.largest_correction:
        return jnp.ones((counted.shape[0], 1))
    apart = jnp.where(counted, apart, 0.0)
    if config.ratio == "sequence":
        apart = jnp.sum(apart, axis=1, keepdims=True)
    return jax.lax.stop_gradient(jnp.minimum(jnp.exp(apart), config.largest_correction))
