"""Grouped products in plain jax.numpy: the definition, and the implementation on a CPU.

Rows are cut into blocks that lie within one group, and a loop visits the blocks that hold rows: its trip count follows
the rows present, and no weight is copied. Gathering the weights of every block for one batched product was slower at
every size tried. `jax.lax.ragged_dot` is not used: on a CPU it multiplies every row with every group.

FP8 operands are dequantised first: products of e4m3 values are exact in float32, so this differs from the promotion
every 128 of K only by float32 rounding.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


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
    group_of_block, used = _group_of_block(group_sizes, lhs.shape[0] // block, block)
    dtype = jnp.promote_types(lhs.dtype, jnp.float32)

    def multiply_block(i, out):
        tile = lax.dynamic_slice_in_dim(lhs, i * block, block)
        weights = lax.dynamic_index_in_dim(rhs, group_of_block[i], keepdims=False)
        product = lax.dot_general(tile, weights, (((1,), (contracted - 1,)), ((), ())), preferred_element_type=dtype)
        return lax.dynamic_update_slice_in_dim(out, product, i * block, 0)

    return lax.fori_loop(0, used, multiply_block, jnp.zeros((lhs.shape[0], rhs.shape[out_axis]), dtype))


def rows_by_rows(
    lhs: Float[Array, "M N"], rhs: Float[Array, "M K"], group_sizes: Int[Array, " G"], block: int
) -> Float[Array, "G N K"]:
    """lhs[rows of g]ᵀ · rhs[rows of g] for every group, in float32: the gradient of the weights.

    `block` divides M and every group size. An empty group gives zeros.
    """
    group_of_block, used = _group_of_block(group_sizes, lhs.shape[0] // block, block)
    dtype = jnp.promote_types(lhs.dtype, jnp.float32)

    def add_block(i, total):
        left = lax.dynamic_slice_in_dim(lhs, i * block, block)
        right = lax.dynamic_slice_in_dim(rhs, i * block, block)
        product = lax.dot_general(left, right, (((0,), (0,)), ((), ())), preferred_element_type=dtype)
        before = lax.dynamic_index_in_dim(total, group_of_block[i], keepdims=True)
        return lax.dynamic_update_slice_in_dim(total, before + product[None], group_of_block[i], 0)

    shape = (group_sizes.shape[0], lhs.shape[1], rhs.shape[1])
    return lax.fori_loop(0, used, add_block, jnp.zeros(shape, dtype))


def masked(lhs: Float[Array, "G M K"], rhs: Float[Array, "G N K"], counts: Int[Array, " G"]) -> Float[Array, "G M N"]:
    """lhs[g, r] · rhs[g]ᵀ for r < counts[g], zero for the other rows, in float32."""
    dtype = jnp.promote_types(lhs.dtype, jnp.float32)
    out = lax.dot_general(lhs, rhs, (((2,), (2,)), ((0,), (0,))), preferred_element_type=dtype)
    return jnp.where((jnp.arange(lhs.shape[1]) < counts[:, None])[..., None], out, 0)


def _group_of_block(
    group_sizes: Int[Array, " G"], blocks: int, block: int
) -> tuple[Int[Array, " blocks"], Int[Array, ""]]:
    """The group of each block of rows (the last group for blocks past the end), and how many blocks hold rows."""
    ends = jnp.cumsum(group_sizes) // block
    group = jnp.searchsorted(ends, jnp.arange(blocks), side="right")
    return jnp.minimum(group, group_sizes.shape[0] - 1).astype(jnp.int32), ends[-1]
