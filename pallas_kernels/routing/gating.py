"""The gate: from router logits to each token's experts, gates and balance statistics.

Report Eq. 13-16 and 18-20 are written out in `routing/reference.py`. Here are the public function and its gradient.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.device import IMPLEMENTATIONS, Implementation, choose_implementation, kernel_module
from pallas_kernels.routing import reference
from pallas_kernels.routing.reference import GateParameters

_MOST_EXPERTS = 384  # whose candidates a warpgroup's registers hold
_MOST_GROUPS = 16  # each is compared with each


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gates:
    """What a router decides for every token, and how evenly it loads the experts.

    Attributes:
      expert_index: the K chosen experts of each token, best first; int32.
      gate: their weights g_{i,t} (Eq. 13), float32.
      load: how many unmasked tokens, of all sequences together, chose each expert; int32.
      affinity_mean: P_i (Eq. 20) of each sequence: the mean over its unmasked tokens of the normalized affinity.
      selection_fraction: f_i (Eq. 18) of each sequence: E / K times the fraction of its unmasked tokens that have
        expert i among the K largest affinities (no bias, no groups). It carries no gradient.
    """

    expert_index: Int[Array, "*S T K"]
    gate: Float[Array, "*S T K"]
    load: Int[Array, " E"]
    affinity_mean: Float[Array, "*S E"]
    selection_fraction: Float[Array, "*S E"]


@jax.named_scope("gate")
def gate(
    logits: Float[Array, "*S T E"],
    bias: Float[Array, " E"] | None,
    *,
    num_experts_per_tok: int,
    n_group: int = 1,
    topk_group: int = 1,
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid",
    group_score: Literal["top2_sum", "max"] = "top2_sum",
    norm_topk_prob: bool = True,
    routed_scaling_factor: float = 1.0,
    token_mask: Bool[Array, "*S T"] | None = None,
    implementation: Implementation | None = None,
) -> Gates:
    """Returns each token's experts, chosen by affinity plus bias within the best groups, and their gates.

    Leading axes of `logits` are sequences. The gradient reaches the logits through `gate` and `affinity_mean`; the
    bias has none. Of equal candidates the lowest index is chosen.

    Args:
      logits: float32. Other floating dtypes run without a kernel and are not converted.
      bias: b_i, added to the affinities for the selection only; None for no bias.
      num_experts_per_tok: K.
      n_group, topk_group: the experts form `n_group` contiguous groups; a token's experts are in `topk_group` of them.
      scoring_func: what turns logits into affinities.
      group_score: a group's score is the sum of its two largest biased affinities, or its largest.
      norm_topk_prob: divide the gates of a token by their sum.
      routed_scaling_factor: multiplies every gate.
      token_mask: False at tokens that the statistics leave out.
      implementation: "reference", "hopper" or "tpu"; the best one for the target unless given.

    Raises:
      ValueError, TypeError: a shape, number or dtype that does not fit, or an implementation that cannot run here. The
        message names the argument.
    """
    _check(logits, bias, token_mask, num_experts_per_tok, n_group, topk_group, scoring_func, group_score)
    experts = logits.shape[-1]
    parameters = GateParameters(
        num_experts_per_tok, n_group, topk_group, scoring_func, group_score, norm_topk_prob, routed_scaling_factor
    )
    name = choose_implementation(implementation, _available(logits, n_group))
    sequences = logits.shape[:-2]
    flat = logits.reshape(-1, *logits.shape[-2:])
    mask = None if token_mask is None else token_mask.reshape(flat.shape[:-1])
    if bias is not None:
        bias = jax.lax.stop_gradient(bias)
    outputs: tuple[jax.Array, ...] = _gate(flat, bias, mask, parameters, name)  # pyright: ignore[reportAssignmentType]
    weights, affinity_mean, index, load, fraction = outputs
    return Gates(
        expert_index=index.reshape(*logits.shape[:-1], num_experts_per_tok),
        gate=weights.reshape(*logits.shape[:-1], num_experts_per_tok),
        load=load,
        affinity_mean=affinity_mean.reshape(*sequences, experts),
        selection_fraction=fraction.reshape(*sequences, experts),
    )


def gates_of_experts(
    logits: Float[Array, "*S T E"],
    experts: Int[Array, "*S T K"],
    *,
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid",
    norm_topk_prob: bool = True,
    routed_scaling_factor: float = 1.0,
) -> Float[Array, "*S T K"]:
    """Returns g_{i,t} (Eq. 13) of experts that were chosen elsewhere; arguments as of `gate`."""
    parameters = GateParameters(experts.shape[-1], 1, 1, scoring_func, "max", norm_topk_prob, routed_scaling_factor)
    scores = reference.affinities(logits, scoring_func)
    # A comparison with every expert instead of a gather: its gradient is a comparison too, not a scatter.
    chosen = experts[..., None] == jnp.arange(logits.shape[-1])
    return reference.gates_of(jnp.sum(jnp.where(chosen, scores[..., None, :], 0.0), axis=-1), parameters)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _gate(logits, bias, mask, parameters: GateParameters, implementation: Implementation) -> tuple[jax.Array, ...]:
    outputs, _ = _gate_forward(logits, bias, mask, parameters, implementation)
    return outputs


def _gate_forward(logits, bias, mask, parameters: GateParameters, implementation: Implementation):
    kernel = kernel_module("routing/gate", implementation).gate
    outputs = kernel(logits, bias, mask, parameters)
    fraction, mean = reference.balance_statistics(outputs, _tokens(logits, mask), parameters.num_experts_per_tok)
    load = jnp.sum(outputs.counts, axis=0)
    return (outputs.gate, mean, outputs.expert_index, load, fraction), (logits, outputs.expert_index, mask)


def _gate_backward(parameters: GateParameters, implementation: Implementation, residuals, cotangents):
    """Returns the gradient to the logits. It scatters nothing: each expert is compared with the K chosen instead."""
    logits, index, mask = residuals
    scores = reference.affinities(logits, parameters.scoring_func)
    weights_bar, mean_bar, *_ = cotangents
    experts = scores.shape[-1]

    chosen = jnp.take_along_axis(scores, index, axis=-1)
    _, gates_vjp = jax.vjp(lambda chosen: reference.gates_of(chosen, parameters), chosen)
    (chosen_bar,) = gates_vjp(weights_bar)
    scores_bar = jnp.zeros_like(scores)
    for slot in range(index.shape[-1]):
        hit = index[..., slot, None] == jnp.arange(experts)
        scores_bar += jnp.where(hit, chosen_bar[..., slot, None], 0.0)

    total = jnp.sum(scores, axis=-1, keepdims=True)
    share_bar = (mean_bar / _tokens(scores, mask))[..., None, :]
    centred = share_bar - jnp.sum(share_bar * scores, axis=-1, keepdims=True) / total
    from_mean = centred / total
    scores_bar += from_mean if mask is None else from_mean * mask[..., None]

    if parameters.scoring_func == "sigmoid":
        logits_bar = scores_bar * scores * (1.0 - scores)
    else:
        logits_bar = scores * (scores_bar - jnp.sum(scores_bar * scores, axis=-1, keepdims=True))
    return logits_bar, None, None


_gate.defvjp(_gate_forward, _gate_backward)


def _available(logits, n_group: int) -> tuple[Implementation, ...]:
    """Returns the implementations for these logits: kernels hold all affinities of a token, in groups of eight."""
    experts = logits.shape[-1]
    fits = experts <= _MOST_EXPERTS and n_group <= _MOST_GROUPS and (experts // n_group) % 8 == 0
    return IMPLEMENTATIONS if fits and logits.dtype == jnp.float32 else ("reference",)


def _tokens(logits, mask):
    """Returns T, the number of unmasked tokens of each sequence and at least 1: [S, 1]."""
    if mask is None:
        return jnp.full((logits.shape[0], 1), float(logits.shape[1]), logits.dtype)
    return jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True), 1).astype(logits.dtype)


def _check(logits, bias, token_mask, chosen, n_group, topk_group, scoring_func, group_score) -> None:
    if logits.ndim < 2:
        raise ValueError(f"logits must be [..., tokens, experts], not of shape {logits.shape}")
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(f"logits must be floating-point numbers, not {logits.dtype}")
    experts = logits.shape[-1]
    if bias is not None and bias.shape != (experts,):
        raise ValueError(f"bias must have shape ({experts},) as logits has {experts} experts, not {bias.shape}")
    if token_mask is not None and token_mask.shape != logits.shape[:-1]:
        raise ValueError(f"token_mask must have shape {logits.shape[:-1]} as logits, not {token_mask.shape}")
    if n_group < 1 or experts % n_group:
        raise ValueError(f"n_group must divide the {experts} experts of logits, not {n_group}")
    if not 1 <= topk_group <= n_group:
        raise ValueError(f"topk_group must be between 1 and n_group ({n_group}), not {topk_group}")
    if not 1 <= chosen <= topk_group * (experts // n_group):
        reachable = topk_group * (experts // n_group)
        raise ValueError(f"num_experts_per_tok must be between 1 and the {reachable} experts in reach, not {chosen}")
    if scoring_func not in reference.SCORING_FUNCTIONS:
        raise ValueError(f"scoring_func must be one of {reference.SCORING_FUNCTIONS}, not {scoring_func!r}")
    if group_score not in reference.GROUP_SCORES:
        raise ValueError(f"group_score must be one of {reference.GROUP_SCORES}, not {group_score!r}")
