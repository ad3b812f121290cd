"""Multiplies the rows that arrived at a rank by the weights of its experts, in blocks (report section 3.2.2).

Every row of a receive buffer may be for any of the rank's experts, but most are for one of them, and not all rows are
filled. For all possible pairs of a row and an expert only indices are sorted. Rows are gathered, multiplied and added
up in blocks that are a little larger than an even load. If more pairs arrive there are more blocks; none is dropped.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

import pallas_kernels
from dsv3_jax.precision.expert_networks import ExpertNetworks, WeightOperands, Weights
from dsv3_jax.precision.prepared import QuantizedRows
from dsv3_jax.precision.tiles import Tiles
from dsv3_jax.sharding.expert_hops import Arrived, Rows, taken
from dsv3_jax.sharding.expert_layout import SELDOM, rows_of_block


@dataclasses.dataclass(frozen=True)
class ExpertsOfRank:
    """The experts of a rank.

    Attributes:
      networks: applies them to rows that are sorted by expert.
      count: how many there are.
      even_load: assignments that arrive together under an even load.
      in_a_loop: whether the first block, too, is computed in the loop over blocks. The program is smaller then, but
        makes more passes over memory.
    """

    networks: ExpertNetworks
    count: int
    even_load: int
    in_a_loop: bool = False

    @property
    def alignment(self) -> int:
        """The rows of an expert are padded to a multiple of this."""
        return pallas_kernels.preferred_row_alignment(self.even_load, self.count)

    @property
    def block(self) -> int:
        """The most rows of a block."""
        return rows_of_block(self.even_load, self.count, self.alignment)


class _Block(NamedTuple):
    """A part of the rows that are sorted by expert.

    Attributes:
      entry: of each row, the index of its entry among the [M * K] entries; M * K where there is none.
      sizes: rows of each expert in the block.
      row: of each entry its row in the block; the last row of the block for entries that are not in it.
      holds: whether the block has a row of the entry.
    """

    entry: Int[Array, " R"]
    sizes: Int[Array, " E"]
    row: Int[Array, " MK"]
    holds: Bool[Array, " MK"]

    @property
    def order(self) -> pallas_kernels.Permutation:
        """The rows of the entries, for `pallas_kernels.combine`."""
        return pallas_kernels.Permutation(self.row, self.entry, self.sizes)


class _Blocks(NamedTuple):
    """The order of all rows by expert; those of entries without an expert come last and are in no block."""

    order: pallas_kernels.Permutation
    is_live: Bool[Array, " MK"]

    @classmethod
    def of(cls, experts: ExpertsOfRank, ids: Int[Array, "M K"]) -> _Blocks:
        """Returns the order for entries with the ids of their experts, which count from 1; 0 for none."""
        index = jnp.where(ids > 0, ids - 1, experts.count)
        order = pallas_kernels.order_by_expert(index, experts.count + 1, row_alignment=experts.alignment)
        return cls(order, (ids > 0).reshape(-1))

    def rows(self, experts: ExpertsOfRank) -> int:
        """Returns the rows of a block: not more than can arrive, which is little where no other rank sends any."""
        return min(experts.block, self.order.slot_of_row.shape[0])

    def count(self, experts: ExpertsOfRank) -> Int[Array, ""]:
        """Returns how many blocks there are, at least one."""
        return jnp.maximum(-(-jnp.sum(self.order.group_sizes[:-1]) // self.rows(experts)), 1)

    def at(self, experts: ExpertsOfRank, index: Int[Array, ""] | int) -> _Block:
        """Returns a block; `experts.alignment` rows without an expert are behind its own."""
        size, none = self.rows(experts), self.is_live.shape[0]
        start = index * size
        entries = self.order.slot_of_row
        entries = jnp.pad(entries, (0, -len(entries) % size), constant_values=none)
        own = jnp.pad(lax.dynamic_slice_in_dim(entries, start, size), (0, experts.alignment), constant_values=none)
        ends = jnp.cumsum(self.order.group_sizes[:-1])
        before, after = (jnp.clip(edge - start, 0, size) for edge in (ends - self.order.group_sizes[:-1], ends))
        row = self.order.row_of_slot - start
        holds = self.is_live & (row >= 0) & (row < size)
        return _Block(own, after - before, jnp.where(holds, row, len(own) - 1), holds)


def apply_at_experts(experts: ExpertsOfRank, arrived: Arrived, weights: Weights) -> Float[Array, "M d"]:
    """Returns sum_i g_i E_i(row) of every row of a receive buffer; the backward pass computes it again.

    Args:
      arrived: the rows, an array or `QuantizedRows`, with the gates and ids of their experts.
    """
    rows, gates, ids = arrived
    if experts.count < ids.shape[1]:
        gates, ids = _one_entry_per_expert(ids, gates, experts.count)
    return _apply(experts, *QuantizedRows.parts(rows), gates, ids, weights)


def gradients_at_experts(
    experts: ExpertsOfRank, arrived: Arrived, weights: Weights, out_bar: Rows, total: Weights
) -> tuple[Float[Array, "M d"], Float[Array, "M K"], WeightOperands, Weights]:
    """Returns the gradients by rows and gates, and what those by the weights are computed from.

    The gradients by weights of further blocks are added to `total`.

    Args:
      weights: those of the experts, which may be `laid_out`.
      out_bar: the gradient of the output; in FP8 if it arrived so.
      total: in the form of the weights as they were before they were laid out.
    """
    rows, gates, ids = arrived
    if experts.count >= ids.shape[1]:
        return _gradients(experts, rows, gates, ids, weights, out_bar, total)
    gates, pull, ids = jax.vjp(lambda gates: _one_entry_per_expert(ids, gates, experts.count), gates, has_aux=True)
    rows_bar, gates_bar, operands, total = _gradients(experts, rows, gates, ids, weights, out_bar, total)
    return rows_bar, pull(gates_bar)[0], operands, total


def _one_entry_per_expert(
    ids: Int[Array, "M K"], gates: Float[Array, "M K"], experts: int
) -> tuple[Float[Array, "M E"], Int[Array, "M E"]]:
    """Rearranges gates and ids into one entry per expert, for ranks with fewer experts than entries per row."""
    expert = jnp.arange(1, experts + 1)
    chosen = ids[:, None] == expert[:, None]
    return jnp.sum(jnp.where(chosen, gates[:, None], 0), axis=2), jnp.where(jnp.any(chosen, axis=2), expert, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _apply(
    experts: ExpertsOfRank,
    rows: Float[Array, "M d"],
    tiles: Tiles | None,
    gates: Float[Array, "M K"],
    ids: Int[Array, "M K"],
    weights: Weights,
) -> Float[Array, "M d"]:
    blocks, given = _Blocks.of(experts, ids), QuantizedRows.joined(rows, tiles)

    def of_block(index: Int[Array, ""] | int) -> Float[Array, "M d"]:
        block = blocks.at(experts, index)
        own = taken(given, block.entry // ids.shape[1])
        out = experts.networks(own, *weights, block.sizes, experts.alignment)
        return pallas_kernels.combine(out, jnp.where(block.holds.reshape(gates.shape), gates, 0), block.order)

    start, total = (0, jnp.zeros_like(rows)) if experts.in_a_loop else (1, of_block(0))
    with jax.named_scope(SELDOM):
        return lax.fori_loop(start, blocks.count(experts), lambda index, total: total + of_block(index), total)


def _forward(experts: ExpertsOfRank, *arguments: Any) -> tuple[Array, tuple[Any, ...]]:
    return _apply(experts, *arguments), arguments


def _backward(
    experts: ExpertsOfRank, arguments: tuple[Any, ...], out_bar: Float[Array, "M d"]
) -> tuple[Array, None, Array, None, Weights]:
    rows, tiles, gates, ids, weights = arguments
    given, nothing = QuantizedRows.joined(rows, tiles), jax.tree.map(jnp.zeros_like, weights)
    if experts.in_a_loop:
        blocks = _Blocks.of(experts, ids)
        of_block = _block_gradients(experts, blocks, given, gates, weights, out_bar)
        start = jnp.zeros_like(rows), jnp.zeros(gates.shape, jnp.promote_types(gates.dtype, jnp.float32)), nothing
        rows_bar, gates_bar, weights_bar = _with_blocks_from(0, experts, blocks, of_block, start)
        return rows_bar, None, gates_bar.astype(gates.dtype), None, weights_bar
    rows_bar, gates_bar, operands, total = _gradients(experts, given, gates, ids, weights, out_bar, nothing)
    return rows_bar, None, gates_bar, None, experts.networks.add_weight_gradients(total, operands, experts.alignment)


_apply.defvjp(_forward, _backward)


def _gradients(
    experts: ExpertsOfRank,
    rows: Float[Array, "M d"] | QuantizedRows,
    gates: Float[Array, "M K"],
    ids: Int[Array, "M K"],
    weights: Weights,
    out_bar: Rows,
    total: Weights,
) -> tuple[Float[Array, "M d"], Float[Array, "M K"], WeightOperands, Weights]:
    """Returns what `gradients_at_experts` does, for rows without more entries than the rank has experts."""
    blocks = _Blocks.of(experts, ids)
    of_block = _block_gradients(experts, blocks, rows, gates, weights, out_bar)
    rows_bar, gates_bar, operands = of_block(0)
    sums = _with_blocks_from(1, experts, blocks, of_block, (rows_bar, gates_bar, total))
    return sums[0], sums[1].astype(gates.dtype), operands, sums[2]


def _block_gradients(
    experts: ExpertsOfRank,
    blocks: _Blocks,
    rows: Float[Array, "M d"] | QuantizedRows,
    gates: Float[Array, "M K"],
    weights: Weights,
    out_bar: Rows,
) -> Callable[[Int[Array, ""] | int], tuple[Float[Array, "M d"], Float[Array, "M K"], WeightOperands]]:
    """Returns a function of a block's index that gives what `ExpertNetworks.row_gradients` does, for all rows."""
    wide = jnp.promote_types(gates.dtype, jnp.float32)

    def of_block(index: Int[Array, ""] | int) -> tuple[Array, Array, WeightOperands]:
        block = blocks.at(experts, index)
        given, bar = taken((rows, out_bar), block.entry // gates.shape[1])
        gate = taken(gates.reshape(-1).astype(wide), block.entry)
        given_bar, gate_bar, operands = experts.networks.row_gradients(
            given, gate, weights, block.sizes, experts.alignment, bar
        )
        rows_bar = pallas_kernels.combine(given_bar, block.holds.reshape(gates.shape).astype(wide), block.order)
        return rows_bar, jnp.where(block.holds, gate_bar[block.row], 0).reshape(gates.shape), operands

    return of_block


def _with_blocks_from(
    first: int,
    experts: ExpertsOfRank,
    blocks: _Blocks,
    of_block: Callable[..., tuple[Array, Array, WeightOperands]],
    sums: tuple[Float[Array, "M d"], Float[Array, "M K"], Weights],
) -> tuple[Float[Array, "M d"], Float[Array, "M K"], Weights]:
    """Returns the sums with the gradients of all blocks from the first given, of which there are seldom any."""

    def add(index: Int[Array, ""], sums: tuple[Array, Array, Weights]) -> tuple[Array, Array, Weights]:
        rows_bar, gates_bar, operands = of_block(index)
        total = experts.networks.add_weight_gradients(sums[2], operands, experts.alignment)
        return sums[0] + rows_bar, sums[1] + gates_bar, total

    with jax.named_scope(SELDOM):
        return lax.fori_loop(first, blocks.count(experts), add, sums)
