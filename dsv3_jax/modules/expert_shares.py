"""The routed experts of whole sequences on a CPU: equal shares in one product, and a loop over what exceeds them.

Every expert has a share, the same number of rows for each. Tokens are copied straight into the shares of their experts,
so that the products of all experts are one product batched over them, which reads the rows where they are. Tokens
beyond a share are computed by a loop over blocks of rows of one expert, which has as many iterations as there are such
blocks. So no token is dropped however uneven the load is, and no pass over all rows only pads, masks or moves them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

Product = Callable[..., Float[Array, "M d"]]
"""Applies experts to rows that are sorted by expert (`precision.ExpertNetworks`)."""

LEAST_SHARE = 16
"""Rows. For smaller shares, reading an expert's weights takes longer than its product."""

_ROOM = 1.25  # a share's rows over the mean load of an expert: loads are seldom even
_BLOCK = 32  # rows of an iteration of the loop


def share_of(assignments: int, experts: int) -> int:
    """Returns the rows of an expert's share where `assignments` (token, expert) pairs are computed."""
    even = -(-assignments // experts)
    return min(-(-int(even * _ROOM) // 8) * 8, assignments)


class _Order(NamedTuple):
    """The order of the (token, expert) pairs, which are called slots; the K slots of a token are side by side.

    Attributes:
      slot_of_row: the slot in each row of the shares; the number of slots where there is none.
      row_of_slot: the row of each slot; the number of rows for a slot beyond its expert's share.
      sorted_slots: all slots by expert, and then a block of slots that do not exist.
      ends: the end of each expert's slots in `sorted_slots`.
      excess: the start in `sorted_slots` of what exceeds each expert's share.
      blocks: running total of the number of blocks that exceed the shares.
    """

    slot_of_row: Int[Array, " ES"]
    row_of_slot: Int[Array, " NK"]
    sorted_slots: Int[Array, " NK+block"]
    ends: Int[Array, " E"]
    excess: Int[Array, " E"]
    blocks: Int[Array, " E"]

    @classmethod
    def of(cls, expert_index: Int[Array, "N K"], experts: int, share: int) -> _Order:
        keys = expert_index.reshape(-1)
        slots = keys.shape[0]
        # One sort of a single integer array: the expert in the high part, the slot in the low part.
        ordered = jnp.sort(keys * slots + jnp.arange(slots, dtype=jnp.int32))
        sorted_slot, sorted_expert = ordered % slots, ordered // slots
        counts = jnp.sum(keys[:, None] == jnp.arange(experts), axis=0, dtype=jnp.int32)
        ends = jnp.cumsum(counts)
        starts = ends - counts
        position = jnp.arange(slots, dtype=jnp.int32) - starts[sorted_expert]
        row = jnp.where(position < share, sorted_expert * share + position, experts * share)
        padded = jnp.pad(sorted_slot, (0, max(share, _BLOCK)), constant_values=slots)
        at = jnp.arange(share, dtype=jnp.int32)
        slot_of_row = jnp.where(at < counts[:, None], padded[starts[:, None] + at], slots).reshape(-1)
        return cls(
            slot_of_row=slot_of_row,
            row_of_slot=jnp.zeros_like(keys).at[sorted_slot].set(row, unique_indices=True),
            sorted_slots=padded,
            ends=ends,
            excess=starts + share,
            blocks=jnp.cumsum(-(-jnp.maximum(counts - share, 0) // _BLOCK)),
        )

    def block(self, i: Int[Array, ""], tokens: int) -> tuple[Int[Array, ""], Int[Array, " B"], Int[Array, " B"]]:
        """Returns the expert of block i of the excess, its slots, and their tokens (`tokens` where there is none)."""
        expert = jnp.searchsorted(self.blocks, i, side="right")
        before = jnp.where(expert > 0, self.blocks[expert - 1], 0)
        start = self.excess[expert] + (i - before) * _BLOCK
        slots = lax.dynamic_slice_in_dim(self.sorted_slots, start, _BLOCK)
        all_slots = self.row_of_slot.shape[0]
        slots = jnp.where(start + jnp.arange(_BLOCK) < self.ends[expert], slots, all_slots)
        return expert, slots, slots // (all_slots // tokens)


def apply_in_shares(
    u: Float[Array, "N d"],
    gates: Float[Array, "N K"],
    expert_index: Int[Array, "N K"],
    gate_up: Float[Array, "E 2 I d"],
    down: Float[Array, "E d I"],
    product: Product,
) -> Float[Array, "N d"]:
    """Returns sum_k gates[n, k] * E(u[n]) over the experts k of every token n, summed in at least float32.

    Args:
      product: applies experts to rows, in the dtype of the computation.
    """
    experts = gate_up.shape[0]
    share = share_of(expert_index.size, experts)
    order = jax.tree.map(lax.stop_gradient, _Order.of(expert_index, experts, share))
    rows = _rows_of_tokens(u, order.slot_of_row, order.row_of_slot, gates.shape[1])
    out = product(rows, gate_up, down, None, share)
    of_shares = _sum_of_rows(out, gates, order.slot_of_row, order.row_of_slot)
    return (of_shares + _excess(u, gates, gate_up, down, order, product)).astype(out.dtype)


# The shares: gathers, whose gradients are gathers too -----------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _rows_of_tokens(
    u: Float[Array, "N d"], slot_of_row: Int[Array, " R"], row_of_slot: Int[Array, " NK"], chosen: int
) -> Float[Array, "R d"]:
    return u.at[slot_of_row // chosen].get(mode="fill", fill_value=0)


def _rows_forward(u, slot_of_row, row_of_slot, chosen):
    return _rows_of_tokens(u, slot_of_row, row_of_slot, chosen), (u.shape[0], row_of_slot)


def _rows_backward(chosen, residuals, rows_bar):
    tokens, row_of_slot = residuals
    each = _rows_of_slots(rows_bar, row_of_slot).reshape(tokens, chosen, -1)
    return jnp.sum(each.astype(_wide(rows_bar)), axis=1).astype(rows_bar.dtype), None, None


_rows_of_tokens.defvjp(_rows_forward, _rows_backward)


@jax.custom_vjp
def _sum_of_rows(
    rows: Float[Array, "R d"], gates: Float[Array, "N K"], slot_of_row: Int[Array, " R"], row_of_slot: Int[Array, " NK"]
) -> Float[Array, "N d"]:
    """Returns the sum over each token's rows, weighted by its gates, in at least float32."""
    each = _rows_of_slots(rows, row_of_slot).reshape(*gates.shape, -1).astype(_wide(rows))
    return jnp.sum(each * gates[..., None].astype(each.dtype), axis=1)


def _sum_forward(rows, gates, slot_of_row, row_of_slot):
    return _sum_of_rows(rows, gates, slot_of_row, row_of_slot), (rows, gates, slot_of_row, row_of_slot)


def _sum_backward(residuals, out_bar):
    rows, gates, slot_of_row, row_of_slot = residuals
    spread = out_bar.at[slot_of_row // gates.shape[1]].get(mode="fill", fill_value=0)
    gate_of_row = gates.reshape(-1).at[slot_of_row].get(mode="fill", fill_value=0).astype(out_bar.dtype)
    per_row = jnp.sum(rows.astype(out_bar.dtype) * spread, axis=-1)
    gates_bar = per_row.at[row_of_slot].get(mode="fill", fill_value=0).reshape(gates.shape).astype(gates.dtype)
    return (spread * gate_of_row[:, None]).astype(rows.dtype), gates_bar, None, None


_sum_of_rows.defvjp(_sum_forward, _sum_backward)


def _rows_of_slots(rows: Float[Array, "R d"], row_of_slot: Int[Array, " NK"]) -> Float[Array, "NK d"]:
    return rows.at[row_of_slot].get(mode="fill", fill_value=0)


def _wide(x: Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)


# The excess: a loop, which the backward pass computes again ------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _excess(
    u: Float[Array, "N d"],
    gates: Float[Array, "N K"],
    gate_up: Float[Array, "E 2 I d"],
    down: Float[Array, "E d I"],
    order: _Order,
    product: Product,
) -> Float[Array, "N d"]:
    """Returns the weighted sum over the slots that exceed their expert's share, in at least float32."""
    wide = _wide(u)

    def add_block(i: Int[Array, ""], total: Float[Array, "N d"]) -> Float[Array, "N d"]:
        expert, slots, tokens = order.block(i, u.shape[0])
        rows = u.at[tokens].get(mode="fill", fill_value=0)
        out = product(rows, *_of_one(expert, gate_up, down), None, _BLOCK).astype(wide)
        weights = gates.reshape(-1).at[slots].get(mode="fill", fill_value=0).astype(wide)
        return total.at[tokens].add(out * weights[:, None], mode="drop")

    return lax.fori_loop(0, order.blocks[-1], add_block, jnp.zeros(u.shape, wide))


def _excess_forward(u, gates, gate_up, down, order, product):
    return _excess(u, gates, gate_up, down, order, product), (u, gates, gate_up, down, order)


def _excess_backward(product, residuals, out_bar):
    u, gates, gate_up, down, order = residuals
    flat = gates.reshape(-1)

    def add_block(i, bars):
        u_bar, gates_bar, gate_up_bar, down_bar = bars
        expert, slots, tokens = order.block(i, u.shape[0])
        rows = u.at[tokens].get(mode="fill", fill_value=0)
        weights = flat.at[slots].get(mode="fill", fill_value=0)
        bar = out_bar.at[tokens].get(mode="fill", fill_value=0)
        of_rows = functools.partial(product, group_sizes=None, row_alignment=_BLOCK)
        out, pull = jax.vjp(of_rows, rows, *_of_one(expert, gate_up, down))
        rows_bar, *own_bars = pull((bar * weights[:, None].astype(bar.dtype)).astype(out.dtype))
        per_row = jnp.sum(out.astype(bar.dtype) * bar, axis=-1)
        return (
            u_bar.at[tokens].add(rows_bar.astype(u_bar.dtype), mode="drop"),
            gates_bar.at[slots].set(per_row.astype(gates_bar.dtype), mode="drop"),
            *(_add_to_one(total, own, expert) for total, own in zip((gate_up_bar, down_bar), own_bars, strict=True)),
        )

    start = (jnp.zeros(u.shape, out_bar.dtype), jnp.zeros_like(flat), jnp.zeros_like(gate_up), jnp.zeros_like(down))
    u_bar, gates_bar, gate_up_bar, down_bar = lax.fori_loop(0, order.blocks[-1], add_block, start)
    return u_bar.astype(u.dtype), gates_bar.reshape(gates.shape), gate_up_bar, down_bar, None


_excess.defvjp(_excess_forward, _excess_backward)


def _of_one(expert: Int[Array, ""], *weights: Float[Array, "E ..."]) -> list[Float[Array, "1 ..."]]:
    return [lax.dynamic_slice_in_dim(weight, expert, 1) for weight in weights]


def _add_to_one(total: Float[Array, "E ..."], own: Float[Array, "1 ..."], expert: Int[Array, ""]) -> Array:
    before = lax.dynamic_slice_in_dim(total, expert, 1)
    return lax.dynamic_update_slice_in_dim(total, before + own, expert, 0)
