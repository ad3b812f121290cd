"""A plain router with a switch for each mistake that implementations of V3 have made in it.

With no switch set it is the definition (report Eq. 12-16), one step per line, independent of the project's kernels.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels


@dataclasses.dataclass(frozen=True)
class Mistakes:
    """Switches of a router; each field that is set re-creates one historical mistake."""

    masked_groups_get_zero: bool = False
    gates_from_biased: bool = False
    gates_recovered_in_bfloat16: bool = False  # (s + b) - b in low precision
    group_score_is_maximum: bool = False
    group_score_without_bias: bool = False
    groups_are_strided: bool = False
    groups_ignored: bool = False
    bias_ignored: bool = False
    bias_in_bfloat16: bool = False
    logits_in_bfloat16: bool = False
    softmax_affinities: bool = False
    gates_not_normalised: bool = False
    gates_not_scaled: bool = False
    gates_normalised_over_all: bool = False


def mutable_gate(mistakes: Mistakes):
    """Returns a substitute for `pallas_kernels.gate` with the given mistakes."""

    def gate(
        logits,
        bias,
        *,
        num_experts_per_tok,
        n_group=1,
        topk_group=1,
        scoring_func="sigmoid",
        group_score="top2_sum",
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
        token_mask=None,
        implementation=None,
    ):
        assert token_mask is None or token_mask.dtype == bool
        experts = logits.shape[-1]
        if mistakes.logits_in_bfloat16:
            logits = logits.astype(jnp.bfloat16).astype(jnp.float32)
        softmax = mistakes.softmax_affinities or scoring_func == "softmax"
        scores = jax.nn.softmax(logits, -1) if softmax else jax.nn.sigmoid(logits)
        bias = jnp.zeros(experts) if bias is None or mistakes.bias_ignored else bias
        if mistakes.bias_in_bfloat16:
            bias = bias.astype(jnp.bfloat16).astype(jnp.float32)
        biased = scores + bias

        choosable = biased
        if n_group > 1 and not mistakes.groups_ignored:
            size = experts // n_group
            group_of = np.arange(experts) % n_group if mistakes.groups_are_strided else np.arange(experts) // size
            ranked = scores if mistakes.group_score_without_bias else biased
            members = jnp.stack([ranked[..., group_of == g] for g in range(n_group)], axis=-2)
            best = 1 if mistakes.group_score_is_maximum or group_score == "max" else 2
            group_scores = jnp.sum(jnp.sort(members, axis=-1)[..., -best:], axis=-1)
            _, kept = jax.lax.top_k(group_scores, topk_group)
            allowed = jnp.any(kept[..., None, :] == group_of[:, None], axis=-1)
            choosable = jnp.where(allowed, biased, 0.0 if mistakes.masked_groups_get_zero else -jnp.inf)
        _, index = jax.lax.top_k(choosable, num_experts_per_tok)

        source = biased if mistakes.gates_from_biased else scores
        if mistakes.gates_recovered_in_bfloat16:
            source = (biased.astype(jnp.bfloat16) - bias.astype(jnp.bfloat16)).astype(jnp.float32)
        gates = jnp.take_along_axis(source, index, -1)
        if norm_topk_prob and not mistakes.gates_not_normalised:
            over = scores if mistakes.gates_normalised_over_all else gates
            gates = gates / (jnp.sum(over, -1, keepdims=True) + 1e-20)
        if not mistakes.gates_not_scaled:
            gates = gates * routed_scaling_factor
        nothing = jnp.zeros((logits.shape[0], experts))
        return pallas_kernels.Gates(
            expert_index=index,
            gate=gates,
            load=jnp.zeros(experts, jnp.int32),
            affinity_mean=nothing,
            selection_fraction=nothing,
        )

    return gate
