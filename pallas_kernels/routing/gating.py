"""The gate: from router logits to each token's experts, gates and balance statistics (report Eq. 13-20)."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.device import Implementation, choose_implementation
from pallas_kernels.routing import reference
from pallas_kernels.routing.reference import GateParameters

_MOST_EXPERTS = 384  # whose candidates a warpgroup's registers hold
_MOST_GROUPS = 16  # each is compared with each


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gates:
    """What the router decides, and how even it is.

    Attributes:
      expert_index: chosen experts, best first.
      gate: their weights, float32.
      load: assignments of unmasked tokens to each expert, all sequences together.
      affinity_mean: P_i of Eq. 20: mean over a sequence's unmasked tokens of the normalised affinity.
      selection_fraction: f_i of Eq. 18: E / K times the share of a sequence's unmasked tokens that hold i in the
        top K of the bare affinities (no bias, no groups); carries no gradient.
    """

    expert_index: Int[Array, "*S T K"]
    gate: Float[Array, "*S T K"]
    load: Int[Array, " E"]
    affinity_mean: Float[Array, "*S E"]
    selection_fraction: Float[Array, "*S E"]


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
    """Chooses experts by biased affinity within the best groups, and weighs them by bare affinity.

    Leading axes of `logits` are sequences. The gradient reaches the logits through `gate` and `affinity_mean`; the
    bias has none. Ties go to the lowest index.

    Args:
      logits: float32; other floating types have no kernel and are worked on as they are.
      bias: added for the selection only; None for none.
      n_group, topk_group: experts form contiguous groups, of which a token may reach `topk_group`.
      group_score: sum of a group's two best biased affinities, or its best.
      token_mask: False at tokens the statistics leave out.

    Raises:
      ValueError, TypeError: shapes or numbers that contradict each other, dtypes, an implementation that cannot run
        here; named.
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _gate(logits, bias, mask, parameters: GateParameters, implementation: str) -> tuple[jax.Array, ...]:
    outputs, _ = _gate_forward(logits, bias, mask, parameters, implementation)
    return outputs


def _gate_forward(logits, bias, mask, parameters: GateParameters, implementation: str):
    kernel = reference.gate
    if implementation != "reference":
        kernel = importlib.import_module(f"pallas_kernels.routing.{implementation}_gate").gate
    index, weights, counts, unrestricted, share_sums = kernel(logits, bias, mask, parameters)
    tokens = _tokens(logits, mask)
    fraction = unrestricted * (logits.shape[-1] / parameters.num_experts_per_tok) / tokens
    return (weights, share_sums / tokens, index, jnp.sum(counts, axis=0), fraction), (logits, index, mask)


def _gate_backward(parameters: GateParameters, implementation: str, residuals, cotangents):
    """Gradient to the logits, written out so that nothing is scattered: K comparisons an expert instead."""
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
    """Kernels hold a token's affinities at once, in whole groups of eight, in float32."""
    experts = logits.shape[-1]
    fits = experts <= _MOST_EXPERTS and n_group <= _MOST_GROUPS and (experts // n_group) % 8 == 0
    return ("reference", "hopper", "tpu") if fits and logits.dtype == jnp.float32 else ("reference",)


def _tokens(logits, mask):
    """Unmasked tokens of each sequence, at least one: [S, 1]."""
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
        raise ValueError(f"topk_group must lie between 1 and n_group ({n_group}), not {topk_group}")
    if not 1 <= chosen <= topk_group * (experts // n_group):
        reachable = topk_group * (experts // n_group)
        raise ValueError(f"num_experts_per_tok must lie between 1 and the {reachable} experts in reach, not {chosen}")
    if scoring_func not in reference.SCORING_FUNCTIONS:
        raise ValueError(f"scoring_func must be one of {reference.SCORING_FUNCTIONS}, not {scoring_func!r}")
    if group_score not in reference.GROUP_SCORES:
        raise ValueError(f"group_score must be one of {reference.GROUP_SCORES}, not {group_score!r}")
