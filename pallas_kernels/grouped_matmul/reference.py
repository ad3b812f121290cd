"""Grouped products in plain jax.numpy: the definition, and the implementation on a CPU.

Rows are cut into blocks that lie within one group. Small weights are gathered a block and multiplied in one batched
product; larger ones are visited in a loop over the blocks that hold rows, which copies no weight twice over and
whose trip count follows the rows present. `jax.lax.ragged_dot` is not used: on a CPU it multiplies every row with
every group.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

# Elements of one group's weights up to which gathering them a block costs less than a loop (measured on 2 cores).
_SMALL_WEIGHTS = 40_000


def rows_by_weights(
    lhs: Float[Array, "M K"], rhs: Float[Array, "G N K"], group_sizes: Int[Array, " G"], block: int
) -> Float[Array, "M N"]:
    """lhs[r] · rhs[group of r]ᵀ, accumulated in float32; rows past the last group are zero.

    `block` divides M and every group size.
    """
    blocks = lhs.shape[0] // block
    group_of_block, used = _group_of_block(group_sizes, blocks, block)
    dtype = jnp.promote_types(lhs.dtype, jnp.float32)
    if rhs.shape[1] * rhs.shape[2] <= _SMALL_WEIGHTS:
        tiles = lhs.reshape(blocks, block, -1)
        out = jnp.einsum("bmk,bnk->bmn", tiles, rhs[group_of_block], preferred_element_type=dtype)
        return jnp.where(jnp.arange(blocks)[:, None, None] < used, out, 0).reshape(lhs.shape[0], -1)

    def multiply_block(i, out):
        tile = lax.dynamic_slice_in_dim(lhs, i * block, block)
        weights = lax.dynamic_index_in_dim(rhs, group_of_block[i], keepdims=False)
        product = lax.dot_general(tile, weights, (((1,), (1,)), ((), ())), preferred_element_type=dtype)
        return lax.dynamic_update_slice_in_dim(out, product, i * block, 0)

    return lax.fori_loop(0, used, multiply_block, jnp.zeros((lhs.shape[0], rhs.shape[1]), dtype))


def rows_by_rows(
    lhs: Float[Array, "M N"], rhs: Float[Array, "M K"], group_sizes: Int[Array, " G"], block: int
) -> Float[Array, "G N K"]:
    """lhs[rows of g]ᵀ · rhs[rows of g] for every group, in float32: the gradient of the weights.

    `block` divides M and every group size. An empty group gives zeros.
    """
    blocks = lhs.shape[0] // block
    group_of_block, used = _group_of_block(group_sizes, blocks, block)
    dtype = jnp.promote_types(lhs.dtype, jnp.float32)

    def add_block(i, total):
        left = lax.dynamic_slice_in_dim(lhs, i * block, block)
        right = lax.dynamic_slice_in_dim(rhs, i * block, block)
        product = lax.dot_general(left, right, (((0,), (0,)), ((), ())), preferred_element_type=dtype)
        before = lax.dynamic_index_in_dim(total, group_of_block[i], keepdims=True)
        return lax.dynamic_update_slice_in_dim(total, before + product[None], group_of_block[i], 0)

    shape = (group_sizes.shape[0], lhs.shape[1], rhs.shape[1])
    return lax.fori_loop(0, used, add_block, jnp.zeros(shape, dtype))


def _group_of_block(
    group_sizes: Int[Array, " G"], blocks: int, block: int
) -> tuple[Int[Array, " blocks"], Int[Array, ""]]:
    """The group of each block of rows (the last group for blocks past the end), and how many blocks hold rows."""
    ends = jnp.cumsum(group_sizes) // block
    group = jnp.searchsorted(ends, jnp.arange(blocks), side="right")
    return jnp.minimum(group, group_sizes.shape[0] - 1).astype(jnp.int32), ends[-1]
