"""Grouped products in plain jax.numpy: what the operations mean, and what runs on a CPU.

If groups are large enough to fill a matrix product, the first rows of every group, an even share each, are multiplied
in one product batched over the groups: no weight is copied and all cores work. A loop multiplies the rows beyond a
group's share, block by block; it has as many iterations as there are such blocks. So no row is dropped however uneven
the groups are, and the cost is that of an even load plus the excess. `jax.lax.ragged_dot` is not used: on a CPU it
multiplies every row with every group.

FP8 operands are dequantized first: products of e4m3 values are exact in float32, so this differs from the promotion
every 128 of K only by float32 rounding.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int


def rows_by_weights(
    lhs: Float[Array, "M K"],
    rhs: Float[Array, "G N K"],
    group_sizes: Int[Array, " G"],
    block: int,
    transposed: bool = False,
) -> Float[Array, "M N"]:
    """Returns lhs[r] · rhs[group of r]ᵀ, summed in float32; rows past the last group are zero.

    `block` divides M and every group size. `transposed`: `rhs` is [G, K, N], and is not transposed.
    """
    contracted, out_axis = (1, 2) if transposed else (2, 1)
    dtype = jnp.promote_types(lhs.dtype, jnp.float32)
    blocks = lhs.reshape(-1, block, lhs.shape[1])
    layout = _Layout.of(group_sizes, blocks.shape[0], block)
    out = jnp.zeros((*blocks.shape[:2], rhs.shape[out_axis]), dtype)
    if layout.share:
        shares = blocks[layout.share_blocks].reshape(rhs.shape[0], -1, lhs.shape[1])
        product = lax.dot_general(shares, rhs, (((2,), (contracted,)), ((0,), (0,))), preferred_element_type=dtype)
        product = product.reshape(-1, block, product.shape[-1])
        out = jnp.where(layout.in_share[:, None, None], product[layout.index_in_shares], 0)

    def multiply_block(i, out):
        at = layout.excess_block(i)
        weights = lax.dynamic_index_in_dim(rhs, layout.group[at], keepdims=False)
        product = lax.dot_general(
            blocks[at], weights, (((1,), (contracted - 1,)), ((), ())), preferred_element_type=dtype
        )
        return lax.dynamic_update_index_in_dim(out, product, at, 0)

    return lax.fori_loop(0, layout.excess, multiply_block, out).reshape(lhs.shape[0], -1)


def rows_by_rows(
    lhs: Float[Array, "M N"], rhs: Float[Array, "M K"], group_sizes: Int[Array, " G"], block: int
) -> Float[Array, "G N K"]:
    """Returns lhs[rows of g]ᵀ · rhs[rows of g] for every group, in float32: the gradient of the weights.

    `block` divides M and every group size. An empty group gives zeros.
    """
    dtype = jnp.promote_types(lhs.dtype, jnp.float32)
    left, right = (x.reshape(-1, block, x.shape[1]) for x in (lhs, rhs))
    groups = group_sizes.shape[0]
    layout = _Layout.of(group_sizes, left.shape[0], block)
    total = jnp.zeros((groups, lhs.shape[1], rhs.shape[1]), dtype)
    if layout.share:
        own = layout.share_is_filled[:, None, None]

        def shares(x: Float[Array, "blocks block w"]) -> Float[Array, "G S w"]:
            return jnp.where(own, x[layout.share_blocks], 0).reshape(groups, -1, x.shape[-1])

        total = lax.dot_general(shares(left), shares(right), (((1,), (1,)), ((0,), (0,))), preferred_element_type=dtype)

    def add_block(i, total):
        at = layout.excess_block(i)
        product = lax.dot_general(left[at], right[at], (((0,), (0,)), ((), ())), preferred_element_type=dtype)
        before = lax.dynamic_index_in_dim(total, layout.group[at], keepdims=True)
        return lax.dynamic_update_slice_in_dim(total, before + product[None], layout.group[at], 0)

    return lax.fori_loop(0, layout.excess, add_block, total)


def masked(lhs: Float[Array, "G M K"], rhs: Float[Array, "G N K"], counts: Int[Array, " G"]) -> Float[Array, "G M N"]:
    """Returns lhs[g, r] · rhs[g]ᵀ for r < counts[g], zero for the other rows, in float32."""
    dtype = jnp.promote_types(lhs.dtype, jnp.float32)
    out = lax.dot_general(lhs, rhs, (((2,), (2,)), ((0,), (0,))), preferred_element_type=dtype)
    return jnp.where((jnp.arange(lhs.shape[1]) < counts[:, None])[..., None], out, 0)


_LEAST_SHARE = 16  # rows; for fewer, reading a group's weights costs more than its product, and it may be empty


class _Layout(NamedTuple):
    """Says which blocks of rows are in their group's share (its first blocks) and which are in excess of it.

    Attributes:
      share: number of blocks in a group's share; 0 where groups are small on average.
      group: group of each block of rows (the last group for blocks past the end).
      share_blocks: blocks of all shares, group by group; blocks of other groups where a group does not fill its share.
      share_is_filled: whether that block is the group's own.
      in_share: whether a block of rows is in its group's share.
      index_in_shares: its index in `share_blocks`.
      excess: number of blocks that are in excess of their group's share.
      excess_ends: running total of that number over the groups.
      ends: running total of all blocks over the groups.
    """

    share: int
    group: Int[Array, " blocks"]
    share_blocks: Int[Array, " shares"]
    share_is_filled: Bool[Array, " shares"]
    in_share: Bool[Array, " blocks"]
    index_in_shares: Int[Array, " blocks"]
    excess: Int[Array, ""]
    excess_ends: Int[Array, " G"]
    ends: Int[Array, " G"]

    @classmethod
    def of(cls, group_sizes: Int[Array, " G"], blocks: int, block: int) -> _Layout:
        groups = group_sizes.shape[0]
        share = blocks // groups
        if share * block < _LEAST_SHARE:
            share = 0
        sizes = group_sizes // block
        ends = jnp.cumsum(sizes)
        at = jnp.arange(blocks)
        group = jnp.minimum(jnp.searchsorted(ends, at, side="right"), groups - 1)
        position = at - (ends - sizes)[group]
        slots = jnp.arange(share)
        excess_ends = jnp.cumsum(jnp.maximum(sizes - share, 0))
        return cls(
            share=share,
            group=group,
            share_blocks=jnp.minimum((ends - sizes)[:, None] + slots, blocks - 1).reshape(-1),
            share_is_filled=(slots < sizes[:, None]).reshape(-1),
            in_share=(position < share) & (at < ends[-1]),
            index_in_shares=group * share + jnp.minimum(position, max(share - 1, 0)),
            excess=excess_ends[-1],
            excess_ends=excess_ends,
            ends=ends,
        )

    def excess_block(self, i: Int[Array, ""]) -> Int[Array, ""]:
        """Returns the i-th block that is in excess of its group's share."""
        group = jnp.searchsorted(self.excess_ends, i, side="right")
        return self.ends[group] - (self.excess_ends[group] - i)
