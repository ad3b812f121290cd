"""Grouped products in plain jax.numpy: the definition, and the implementation on a CPU.

Where groups are large enough to fill a matrix product, the first rows of every group, an even share each, go through
one product batched over the groups: no weight is copied and all cores work. What a group holds beyond its share is
visited by a loop, block by block, whose trip count follows the rows that are there. However the rows fall, none is
left out, and the cost is that of an even load plus the excess. `jax.lax.ragged_dot` is not used: on a CPU it multiplies
every row with every group.

FP8 operands are dequantised first: products of e4m3 values are exact in float32, so this differs from the promotion
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
    """lhs[r] · rhs[group of r]ᵀ, accumulated in float32; rows past the last group are zero.

    `block` divides M and every group size. `transposed`: without the transposition, `rhs` being [G, K, N].
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
        out = jnp.where(layout.in_share[:, None, None], product[layout.place_in_shares], 0)

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
    """lhs[rows of g]ᵀ · rhs[rows of g] for every group, in float32: the gradient of the weights.

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
    """lhs[g, r] · rhs[g]ᵀ for r < counts[g], zero for the other rows, in float32."""
    dtype = jnp.promote_types(lhs.dtype, jnp.float32)
    out = lax.dot_general(lhs, rhs, (((2,), (2,)), ((0,), (0,))), preferred_element_type=dtype)
    return jnp.where((jnp.arange(lhs.shape[1]) < counts[:, None])[..., None], out, 0)


_LEAST_SHARE = 16  # rows; below, a group's weights cost more to read than the product, and many groups may be empty


class _Layout(NamedTuple):
    """Where each group's blocks of rows are: its share at the front, its excess behind.

    Attributes:
      share: blocks of a group's share; 0 where groups are small on average.
      group: group of each block of rows (the last for blocks past the end).
      share_blocks: blocks of all shares, group by group; where a group does not fill its share, any other.
      share_is_filled: whether that block is the group's own.
      in_share: whether a block of rows is in its group's share.
      place_in_shares: where among all shares.
      excess: how many blocks hold rows beyond their group's share.
      excess_ends: that count, summed up to and with each group.
      ends: blocks of all groups, summed likewise.
    """

    share: int
    group: Int[Array, " blocks"]
    share_blocks: Int[Array, " shares"]
    share_is_filled: Bool[Array, " shares"]
    in_share: Bool[Array, " blocks"]
    place_in_shares: Int[Array, " blocks"]
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
        place = at - (ends - sizes)[group]
        slots = jnp.arange(share)
        excess_ends = jnp.cumsum(jnp.maximum(sizes - share, 0))
        return cls(
            share=share,
            group=group,
            share_blocks=jnp.minimum((ends - sizes)[:, None] + slots, blocks - 1).reshape(-1),
            share_is_filled=(slots < sizes[:, None]).reshape(-1),
            in_share=(place < share) & (at < ends[-1]),
            place_in_shares=group * share + jnp.minimum(place, max(share - 1, 0)),
            excess=excess_ends[-1],
            excess_ends=excess_ends,
            ends=ends,
        )

    def excess_block(self, i: Int[Array, ""]) -> Int[Array, ""]:
        """The i-th block that is beyond its group's share."""
        group = jnp.searchsorted(self.excess_ends, i, side="right")
        return self.ends[group] - (self.excess_ends[group] - i)
