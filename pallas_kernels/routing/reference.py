"""Routing in plain jax.numpy: what the operations mean, and what runs on a CPU.

The gate, in the symbols of the report (section 2.1.2): u_t is a token's hidden state, e_i the centroid of expert i, b_i
its bias; N_r experts are routed, K_r of them chosen per token; T is the number of tokens of a sequence. `logits` holds
u_tᵀ e_i.

    s_{i,t}  = Sigmoid(u_tᵀ e_i)                                                          Eq. 15   affinities
    g'_{i,t} = s_{i,t}  if s_{i,t} + b_i is in Topk({s_{j,t} + b_j}, K_r), else 0          Eq. 16   select
               (without a bias this is Eq. 14; node-limited routing looks at the best groups of experts only)
    g_{i,t}  = g'_{i,t} / sum_j g'_{j,t}                                                  Eq. 13   gates_of
    f_i      = N_r / (K_r T) * sum_t [s_{i,t} is in Topk({s_{j,t}}, K_r)]                 Eq. 18   balance_statistics
    s'_{i,t} = s_{i,t} / sum_j s_{j,t}                                                    Eq. 19   gate
    P_i      = 1 / T * sum_t s'_{i,t}                                                     Eq. 20   balance_statistics

Eq. 12, the layer's output, is `dsv3_jax.modules.moe`; Eq. 17, the balance loss, sums f_i P_i over the experts.
"""

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
    """The settings of a router, which are static; `pallas_kernels.gate` explains each."""

    num_experts_per_tok: int
    n_group: int
    topk_group: int
    scoring_func: Literal["sigmoid", "softmax"]
    group_score: Literal["top2_sum", "max"]
    norm_topk_prob: bool
    routed_scaling_factor: float


class GateOutputs(NamedTuple):
    """What every implementation of the gate computes in one pass over the logits.

    Attributes:
      expert_index: the chosen experts of each token, best first.
      gate: g_{i,t} of the chosen experts.
      counts: how many counted (not masked) tokens of each sequence chose each expert.
      unrestricted_counts: how many would have by affinity alone, without biases and groups: the sum over t in Eq. 18.
      share_sums: sum of s'_{i,t} over the counted tokens: the sum over t in Eq. 20.
    """

    expert_index: Int[Array, "S T K"]
    gate: Float[Array, "S T K"]
    counts: Int[Array, "S E"]
    unrestricted_counts: Int[Array, "S E"]
    share_sums: Float[Array, "S E"]


def gate(
    logits: Float[Array, "S T E"],
    bias: Float[Array, " E"] | None,
    mask: Bool[Array, "S T"] | None,
    parameters: GateParameters,
) -> GateOutputs:
    """Returns the experts, gates and balance sums of every token; `mask` is False at tokens that sums leave out."""
    s = affinities(logits, parameters.scoring_func)  # Eq. 15
    index = select(s, bias, parameters)  # Eq. 16
    g = gates_of(jnp.take_along_axis(s, index, axis=-1), parameters)  # Eq. 13
    shares = s / jnp.sum(s, axis=-1, keepdims=True)  # Eq. 19
    if mask is not None:
        shares = shares * mask[..., None]
    experts = logits.shape[-1]
    counts = unrestricted = count_assignments(index, experts, mask)
    if bias is not None or parameters.n_group > 1:
        top = lax.top_k(s, parameters.num_experts_per_tok)[1]
        unrestricted = count_assignments(top, experts, mask)
    return GateOutputs(index, g, counts, unrestricted, jnp.sum(shares, axis=-2))


def affinities(logits: Float[Array, "*batch E"], scoring_func: str) -> Float[Array, "*batch E"]:
    """Returns s_{i,t}, how well each token suits each expert (Eq. 15; DeepSeek-V2 has softmax for the sigmoid)."""
    return jax.nn.sigmoid(logits) if scoring_func == "sigmoid" else jax.nn.softmax(logits, axis=-1)


def select(
    scores: Float[Array, "*batch E"], bias: Float[Array, " E"] | None, parameters: GateParameters
) -> Int[Array, "*batch K"]:
    """Returns the K_r experts of each token with the largest s_{i,t} + b_i (Eq. 16) within the token's best groups.

    The experts of a group are on one node. A token may use the `topk_group` groups with the highest scores, a group's
    score being the sum of its two largest s_{i,t} + b_i, or its largest. Of equal experts the lowest index wins.
    """
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
    """Returns g_{i,t} of the chosen experts from their s_{i,t} (Eq. 13), times the scaling factor of the routed sum."""
    if parameters.norm_topk_prob:
        chosen = chosen / (jnp.sum(chosen, axis=-1, keepdims=True) + EPSILON)
    return chosen * parameters.routed_scaling_factor


def balance_statistics(
    outputs: GateOutputs, tokens: Float[Array, "S 1"], num_experts_per_tok: int
) -> tuple[Float[Array, "S E"], Float[Array, "S E"]]:
    """Returns f_i (Eq. 18) and P_i (Eq. 20) of every sequence; `tokens` is T, the tokens that count in each."""
    experts = outputs.share_sums.shape[-1]
    f = outputs.unrestricted_counts * (experts / num_experts_per_tok) / tokens
    return f, outputs.share_sums / tokens


def count_assignments(
    expert_index: Int[Array, "S T K"], experts: int, token_mask: Bool[Array, "S T"] | None
) -> Int[Array, "S E"]:
    """Returns how many tokens of each sequence have each expert among their chosen ones."""
    hits = jnp.any(expert_index[..., None] == jnp.arange(experts), axis=-2)
    if token_mask is not None:
        hits = hits & token_mask[..., None]
    return jnp.sum(hits, axis=-2, dtype=jnp.int32)


def expert_order(
    expert_index: Int[Array, "T K"], experts: int, row_alignment: int
) -> tuple[Int[Array, " TK"], Int[Array, " M"], Int[Array, " E"]]:
    """Sorts the (token, expert) pairs by expert; the rows of each expert are padded to a multiple of `row_alignment`.

    Returns:
      row_of_slot: the row of each pair; the pairs of a token are side by side.
      slot_of_row: the pair of each row; T*K at padding rows.
      group_sizes: the rows of each expert, padding included.
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
    """Returns the most rows that `slots` pairs can take when sorted, a multiple of `row_alignment`."""
    most = slots + min(experts, slots) * (row_alignment - 1)
    return most // row_alignment * row_alignment


def permute(
    x: Float[Array, "T d"], row_of_slot: Int[Array, " TK"], slot_of_row: Int[Array, " M"]
) -> Float[Array, "M d"]:
    """Returns each token's row at the K rows of its pairs, and zeros at padding rows."""
    return _rows_of_tokens(x, row_of_slot.shape[0] // x.shape[0], slot_of_row)


def combine(
    rows: Float[Array, "M d"], gate: Float[Array, "T K"], row_of_slot: Int[Array, " TK"]
) -> Float[Array, "T d"]:
    """Returns sum_k gate[t, k] * rows[row of (t, k)] for every token t, summed in float32."""
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
    """Returns the gradients of `combine` to its rows and its gates, by gathers where autodiff would scatter."""
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    gate_of_row = gate.reshape(-1).at[slot_of_row].get(mode="fill", fill_value=0)
    spread = _rows_of_tokens(out_bar, gate.shape[1], slot_of_row).astype(wide)
    rows_bar = (spread * gate_of_row[:, None].astype(wide)).astype(rows.dtype)
    per_row = jnp.sum(rows.astype(wide) * spread, axis=-1)
    return rows_bar, per_row[row_of_slot].reshape(gate.shape).astype(gate.dtype)


def _rows_of_tokens(x: Float[Array, "T d"], chosen: int, slot_of_row: Int[Array, " M"]) -> Float[Array, "M d"]:
    return x.at[slot_of_row // chosen].get(mode="fill", fill_value=0)
