"""Routing in plain jax.numpy: the definition of the operations, and the implementation on a CPU."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

GROUP_SCORES = ("top2_sum", "max")
SCORING_FUNCTIONS = ("sigmoid", "softmax")
EPSILON = 1e-20  # keeps a token whose chosen affinities all underflow from dividing by zero


class GateParameters(NamedTuple):
    """The static numbers of a router; see `pallas_kernels.gate`."""

    num_experts_per_tok: int
    n_group: int
    topk_group: int
    scoring_func: Literal["sigmoid", "softmax"]
    group_score: Literal["top2_sum", "max"]
    norm_topk_prob: bool
    routed_scaling_factor: float


class GateOutputs(NamedTuple):
    """What every implementation of the gate computes in its one pass."""

    expert_index: Int[Array, "S T K"]
    gate: Float[Array, "S T K"]
    counts: Int[Array, "S E"]  # assignments of counted tokens
    unrestricted_counts: Int[Array, "S E"]  # had the bare affinities decided, with neither bias nor groups
    share_sums: Float[Array, "S E"]  # of the counted tokens' normalised affinities


def gate(
    logits: Float[Array, "S T E"],
    bias: Float[Array, " E"] | None,
    mask: Bool[Array, "S T"] | None,
    parameters: GateParameters,
) -> GateOutputs:
    scores = affinities(logits, parameters.scoring_func)
    index = select(scores, bias, parameters)
    weights = gates_of(jnp.take_along_axis(scores, index, axis=-1), parameters)
    shares = scores / jnp.sum(scores, axis=-1, keepdims=True)
    if mask is not None:
        shares = shares * mask[..., None]
    experts = logits.shape[-1]
    counts = unrestricted = count_assignments(index, experts, mask)
    if bias is not None or parameters.n_group > 1:
        top = lax.top_k(scores, parameters.num_experts_per_tok)[1]
        unrestricted = count_assignments(top, experts, mask)
    return GateOutputs(index, weights, counts, unrestricted, jnp.sum(shares, axis=-2))


def affinities(logits: Float[Array, "*batch E"], scoring_func: str) -> Float[Array, "*batch E"]:
    """s: how well each token suits each expert, without the selection bias."""
    return jax.nn.sigmoid(logits) if scoring_func == "sigmoid" else jax.nn.softmax(logits, axis=-1)


def select(
    scores: Float[Array, "*batch E"], bias: Float[Array, " E"] | None, parameters: GateParameters
) -> Int[Array, "*batch K"]:
    """The experts of each token: the top K of score plus bias within the best groups, lowest index first on ties."""
    biased = scores if bias is None else scores + bias
    if parameters.n_group > 1:
        grouped = biased.reshape(*biased.shape[:-1], parameters.n_group, -1)
        if parameters.group_score == "top2_sum":
            group_scores = jnp.sum(lax.top_k(grouped, min(2, grouped.shape[-1]))[0], axis=-1)
        else:
            group_scores = jnp.max(grouped, axis=-1)
        _, kept = lax.top_k(group_scores, parameters.topk_group)
        allowed = jnp.any(kept[..., :, None] == jnp.arange(parameters.n_group), axis=-2)
        # Minus infinity, never zero: a biased score may be negative.
        biased = jnp.where(allowed[..., None], grouped, -jnp.inf).reshape(biased.shape)
    return lax.top_k(biased, parameters.num_experts_per_tok)[1]


def gates_of(chosen: Float[Array, "*batch K"], parameters: GateParameters) -> Float[Array, "*batch K"]:
    """Gates from the affinities of the chosen experts."""
    if parameters.norm_topk_prob:
        chosen = chosen / (jnp.sum(chosen, axis=-1, keepdims=True) + EPSILON)
    return chosen * parameters.routed_scaling_factor


def count_assignments(
    expert_index: Int[Array, "S T K"], experts: int, token_mask: Bool[Array, "S T"] | None
) -> Int[Array, "S E"]:
    """How many (token, slot) pairs of each sequence go to each expert."""
    hits = jnp.any(expert_index[..., None] == jnp.arange(experts), axis=-2)
    if token_mask is not None:
        hits = hits & token_mask[..., None]
    return jnp.sum(hits, axis=-2, dtype=jnp.int32)


def expert_order(
    expert_index: Int[Array, "T K"], experts: int, row_alignment: int
) -> tuple[Int[Array, " TK"], Int[Array, " M"], Int[Array, " E"]]:
    """Where each assignment goes when they are sorted by expert, each expert's share padded to `row_alignment`.

    Returns:
      row_of_slot: row of each (token, slot) pair, slots of a token side by side.
      slot_of_row: the pair of each row; the number of pairs marks padding.
      group_sizes: padded rows of each expert.
    """
    keys = expert_index.reshape(-1)
    slots = keys.shape[0]
    if slots * experts < 2**31:
        # One sort of a single integer array: the expert in the high part, the slot in the low part.
        ordered = jnp.sort(keys * slots + jnp.arange(slots, dtype=jnp.int32))
        sorted_slot, sorted_expert = ordered % slots, ordered // slots
    else:
        sorted_slot = jnp.argsort(keys, stable=True)
        sorted_expert = keys[sorted_slot]
    counts = jnp.sum(keys[:, None] == jnp.arange(experts), axis=0, dtype=jnp.int32)
    group_sizes = -(-counts // row_alignment) * row_alignment
    shift = (jnp.cumsum(group_sizes) - group_sizes) - (jnp.cumsum(counts) - counts)
    sorted_row = jnp.arange(slots, dtype=jnp.int32) + shift[sorted_expert]
    rows = row_bound(slots, experts, row_alignment)
    row_of_slot = jnp.zeros((slots,), jnp.int32).at[sorted_slot].set(sorted_row, unique_indices=True)
    slot_of_row = jnp.full((rows,), slots, jnp.int32).at[sorted_row].set(sorted_slot, unique_indices=True)
    return row_of_slot, slot_of_row, group_sizes


def row_bound(slots: int, experts: int, row_alignment: int) -> int:
    """The most rows that `slots` assignments can take, a multiple of `row_alignment`."""
    most = slots + min(experts, slots) * (row_alignment - 1)
    return -(-most // row_alignment) * row_alignment


def permute(
    x: Float[Array, "T d"], row_of_slot: Int[Array, " TK"], slot_of_row: Int[Array, " M"]
) -> Float[Array, "M d"]:
    """Each token's row at the K places its slots have; zeros at rows without a slot."""
    return _rows_of_tokens(x, row_of_slot.shape[0] // x.shape[0], slot_of_row)


def combine(
    rows: Float[Array, "M d"], gate: Float[Array, "T K"], row_of_slot: Int[Array, " TK"]
) -> Float[Array, "T d"]:
    """sum_k gate[t, k] * rows[row of (t, k)], added up in float32."""
    tokens, chosen = gate.shape
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    gathered = rows[row_of_slot].reshape(tokens, chosen, -1).astype(wide)
    return jnp.sum(gathered * gate[..., None].astype(wide), axis=1).astype(rows.dtype)


def combine_gradient(
    rows: Float[Array, "M d"],
    gate: Float[Array, "T K"],
    out_bar: Float[Array, "T d"],
    row_of_slot: Int[Array, " TK"],
    slot_of_row: Int[Array, " M"],
) -> tuple[Float[Array, "M d"], Float[Array, "T K"]]:
    """Of `combine`, to its rows and to its gates: gathers where the transposed program would scatter."""
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    gate_of_row = gate.reshape(-1).at[slot_of_row].get(mode="fill", fill_value=0)
    spread = _rows_of_tokens(out_bar, gate.shape[1], slot_of_row).astype(wide)
    rows_bar = (spread * gate_of_row[:, None].astype(wide)).astype(rows.dtype)
    per_row = jnp.sum(rows.astype(wide) * spread, axis=-1)
    return rows_bar, per_row[row_of_slot].reshape(gate.shape).astype(gate.dtype)


def _rows_of_tokens(x: Float[Array, "T d"], chosen: int, slot_of_row: Int[Array, " M"]) -> Float[Array, "M d"]:
    return x.at[slot_of_row // chosen].get(mode="fill", fill_value=0)
