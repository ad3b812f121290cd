"""Moves tokens to expert order and back; gradients gather instead of scattering, so that they are repeatable."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.device import IMPLEMENTATIONS, Implementation, choose_implementation, kernel_module
from pallas_kernels.routing import reference


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Permutation:
    """The order of the (token, expert) pairs when they are sorted by expert.

    Attributes:
      row_of_slot: the row of each pair; the K pairs of a token are side by side.
      slot_of_row: the pair of each row; T*K at padding rows.
      group_sizes: the rows of each expert, padding included: multiples of the alignment.
    """

    row_of_slot: Int[Array, " TK"]
    slot_of_row: Int[Array, " M"]
    group_sizes: Int[Array, " E"]


def order_by_expert(expert_index: Int[Array, "T K"], num_experts: int, *, row_alignment: int = 1) -> Permutation:
    """Returns the order in which `permute` sorts tokens by expert, for callers that move rows themselves.

    Args:
      expert_index: the K experts of each token, integers.
      row_alignment: the rows of each expert are padded to a multiple of this.

    Raises:
      ValueError, TypeError: a shape or dtype that does not fit, which is named.
    """
    if expert_index.ndim != 2:
        raise ValueError(f"expert_index must be [tokens, slots], not {expert_index.shape}")
    if not jnp.issubdtype(expert_index.dtype, jnp.integer):
        raise TypeError(f"expert_index must hold integers, not {expert_index.dtype}")
    if row_alignment < 1 or num_experts < 1:
        raise ValueError(f"row_alignment and num_experts must be positive, not {row_alignment} and {num_experts}")
    return Permutation(*reference.expert_order(expert_index, num_experts, row_alignment))


@jax.named_scope("permute")
def permute(
    x: Float[Array, "T d"],
    expert_index: Int[Array, "T K"],
    num_experts: int,
    *,
    row_alignment: int = 1,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "M d"], Permutation]:
    """Returns a copy of each token for each of its experts, sorted by expert, and the permutation.

    Args:
      x: float32 or bfloat16 for kernels; any dtype otherwise.
      expert_index: the K experts of each token, integers.
      row_alignment: the rows of each expert are padded with zeros to a multiple of this.

    Returns:
      M rows, the most that T*K pairs can take under the alignment (rows past the groups are zero), and their order.

    Raises:
      ValueError, TypeError: a shape or dtype that does not fit, which is named, or an implementation that cannot run.
    """
    if x.ndim != 2 or expert_index.ndim != 2 or expert_index.shape[0] != x.shape[0]:
        raise ValueError(
            f"expert_index must be [tokens, slots] for x [tokens, width], not {expert_index.shape} for {x.shape}"
        )
    permutation = order_by_expert(expert_index, num_experts, row_alignment=row_alignment)
    name = choose_implementation(implementation, _available(x))
    return _permute(x, permutation, expert_index.shape[1], name), permutation


@jax.named_scope("combine")
def combine(
    rows: Float[Array, "M d"],
    gate: Float[Array, "T K"],
    permutation: Permutation,
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "T d"]:
    """Returns sum_k gate[t, k] * row of (t, k) for every token t, summed in float32, in the dtype of `rows`."""
    slots = permutation.row_of_slot.shape[0]
    if gate.ndim != 2 or gate.size != slots:
        raise ValueError(f"gate must be [tokens, slots] with {slots} elements, not of shape {gate.shape}")
    if rows.ndim != 2 or rows.shape[0] != permutation.slot_of_row.shape[0]:
        raise ValueError(f"rows must be [{permutation.slot_of_row.shape[0]}, width], not of shape {rows.shape}")
    return _combine(rows, gate, permutation, choose_implementation(implementation, _available(rows)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _permute(x, permutation: Permutation, chosen: int, implementation: Implementation):
    return kernel_module("routing/rows", implementation).permute(x, permutation.row_of_slot, permutation.slot_of_row)


def _permute_forward(x, permutation, chosen, implementation):
    return _permute(x, permutation, chosen, implementation), permutation


def _permute_backward(chosen, implementation, permutation, rows_bar):
    """Returns the sum of each token's rows: `combine` with every gate 1."""
    ones = jnp.ones((permutation.row_of_slot.shape[0] // chosen, chosen), jnp.float32)
    return kernel_module("routing/rows", implementation).combine(rows_bar, ones, permutation.row_of_slot), None


_permute.defvjp(_permute_forward, _permute_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _combine(rows, gate, permutation: Permutation, implementation: Implementation):
    return kernel_module("routing/rows", implementation).combine(rows, gate, permutation.row_of_slot)


def _combine_forward(rows, gate, permutation, implementation):
    return _combine(rows, gate, permutation, implementation), (rows, gate, permutation)


def _combine_backward(implementation, residuals, out_bar):
    rows, gate, permutation = residuals
    rows_bar, gate_bar = kernel_module("routing/rows", implementation).combine_gradient(
        rows, gate, out_bar, permutation.row_of_slot, permutation.slot_of_row
    )
    return rows_bar, gate_bar.astype(gate.dtype), None


_combine.defvjp(_combine_forward, _combine_backward)


def _available(x) -> tuple[Implementation, ...]:
    """Returns the implementations for `x`: kernels move rows in pieces of 128 elements, on a TPU of 128 words."""
    if x.dtype not in (jnp.bfloat16, jnp.float32) or x.shape[1] % 128:
        return ("reference",)
    return IMPLEMENTATIONS if x.shape[1] * x.dtype.itemsize % 512 == 0 else ("reference", "hopper")
