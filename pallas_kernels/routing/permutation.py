"""Tokens to expert order and back, with gradients that gather instead of scatter (so that they are repeatable)."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.device import Implementation, choose_implementation
from pallas_kernels.routing import reference


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Permutation:
    """How (token, slot) pairs lie in expert order.

    Attributes:
      row_of_slot: row of each pair, the slots of a token side by side.
      slot_of_row: pair of each row; T*K at padding rows.
      group_sizes: rows of each expert, padding included: multiples of the alignment.
    """

    row_of_slot: Int[Array, " TK"]
    slot_of_row: Int[Array, " M"]
    group_sizes: Int[Array, " E"]


def permute(
    x: Float[Array, "T d"],
    expert_index: Int[Array, "T K"],
    num_experts: int,
    *,
    row_alignment: int = 1,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "M d"], Permutation]:
    """Copies each token once for each of its experts, sorted by expert.

    Args:
      row_alignment: each expert's rows are padded with zeros to a multiple of this.

    Returns:
      Rows, M of them: the most that T*K assignments can take under the alignment; rows past the groups are zero.
    """
    if x.ndim != 2 or expert_index.ndim != 2 or expert_index.shape[0] != x.shape[0]:
        raise ValueError(
            f"expert_index must be [tokens, slots] for x [tokens, width], not {expert_index.shape} for {x.shape}"
        )
    if not jnp.issubdtype(expert_index.dtype, jnp.integer):
        raise TypeError(f"expert_index must hold integers, not {expert_index.dtype}")
    if row_alignment < 1 or num_experts < 1:
        raise ValueError(f"row_alignment and num_experts must be positive, not {row_alignment} and {num_experts}")
    choose_implementation(implementation)
    permutation = Permutation(*reference.expert_order(expert_index, num_experts, row_alignment))
    return _permute(x, permutation, expert_index.shape[1]), permutation


def combine(
    rows: Float[Array, "M d"],
    gate: Float[Array, "T K"],
    permutation: Permutation,
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "T d"]:
    """The weighted sum of each token's rows, added up in float32 and returned in the dtype of `rows`."""
    slots = permutation.row_of_slot.shape[0]
    if gate.ndim != 2 or gate.size != slots:
        raise ValueError(f"gate must be [tokens, slots] with {slots} elements, not of shape {gate.shape}")
    if rows.shape[0] != permutation.slot_of_row.shape[0]:
        raise ValueError(f"rows must have {permutation.slot_of_row.shape[0]} rows, not shape {rows.shape}")
    choose_implementation(implementation)
    return _combine(rows, gate, permutation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _permute(x, permutation: Permutation, chosen: int):
    return reference.gather_rows(x, permutation.slot_of_row // chosen)


def _permute_forward(x, permutation, chosen):
    return _permute(x, permutation, chosen), permutation


def _permute_backward(chosen, permutation, rows_bar):
    per_slot = rows_bar[permutation.row_of_slot].reshape(-1, chosen, rows_bar.shape[-1])
    wide = jnp.promote_types(rows_bar.dtype, jnp.float32)
    return jnp.sum(per_slot.astype(wide), axis=1).astype(rows_bar.dtype), None


_permute.defvjp(_permute_forward, _permute_backward)


@jax.custom_vjp
def _combine(rows, gate, permutation: Permutation):
    return reference.weighted_sum(rows, gate, permutation.row_of_slot).astype(rows.dtype)


def _combine_forward(rows, gate, permutation):
    return _combine(rows, gate, permutation), (rows, gate, permutation)


def _combine_backward(residuals, out_bar):
    rows, gate, permutation = residuals
    tokens, chosen = gate.shape
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    gate_of_row = gate.reshape(-1).at[permutation.slot_of_row].get(mode="fill", fill_value=0)
    spread = reference.gather_rows(out_bar, permutation.slot_of_row // chosen)
    rows_bar = (spread.astype(wide) * gate_of_row[:, None].astype(wide)).astype(rows.dtype)
    per_row = jnp.sum(rows.astype(wide) * spread.astype(wide), axis=-1)
    gate_bar = per_row[permutation.row_of_slot].reshape(tokens, chosen).astype(gate.dtype)
    return rows_bar, gate_bar, None


_combine.defvjp(_combine_forward, _combine_backward)
