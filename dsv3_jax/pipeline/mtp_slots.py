"""Keeps the blocks of the MTP modules in layer slots of the last stage, which alone computes them.

A block has the weights of a MoE layer. Every rank has as many layer slots as the fullest stage needs, and the last
stage often has fewer MoE layers than that, because the first stage's dense layers make the division uneven. Then the
blocks and their gradients need no memory of their own on any rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Int

from dsv3_jax.pipeline.executor import AXIS
from dsv3_jax.pipeline.weights import is_of_mtp_block

Blocks = list[nnx.State]
"""What belongs to the weights of the block of every MTP module: themselves, their gradients, or their layouts."""


def split_blocks(tree: nnx.State) -> tuple[nnx.State, Blocks]:
    """Returns a tree of parameters without the blocks of the MTP modules, and the blocks."""
    blocks, others = nnx.split_state(tree, lambda path, _: is_of_mtp_block(path), ...)
    modules = blocks.get("mtp", {})
    return others, [modules[k]["block"] for k in range(len(modules))]


def tree_of_blocks(blocks: Blocks) -> nnx.State:
    """Returns the part of a tree of parameters that `split_blocks` takes out of it."""
    return nnx.State({"mtp": {k: {"block": block} for k, block in enumerate(blocks)}} if blocks else {})


def with_slots(stacks: Any, slots: int) -> Any:
    """Returns stacks of layers [L, ...] with slots of zeros behind them: [slots, ...]."""

    def one(leaf: Array) -> Array:
        more = slots - leaf.shape[0]
        return jnp.concatenate([leaf, jnp.zeros((more, *leaf.shape[1:]), leaf.dtype)]) if more else leaf

    return jax.tree.map(one, stacks)


def put_blocks(stacks: nnx.State, blocks: Blocks, first: int) -> nnx.State:
    """Returns the MoE layers [slots, ...] of a rank's own stage, if it is the last with the blocks from a slot on."""
    last = _is_last_stage()

    def put(stack: Array, ones: Sequence[Array]) -> Array:
        held = jnp.where(last, jnp.stack(ones), stack[first : first + len(blocks)])
        return lax.dynamic_update_slice_in_dim(stack, held, first, 0)

    return _with_blocks(put, stacks, blocks)


def take_blocks(gradients: nnx.State, blocks: Blocks, first: int) -> Blocks:
    """Returns the gradients of `put_blocks` by the blocks, which are zeros on all stages but the last."""
    last = _is_last_stage()
    return jax.tree.map(lambda leaf: jnp.where(last, leaf, 0), read_blocks(gradients, blocks, first))


def read_blocks(stacks: nnx.State, blocks: Blocks, first: int | Int[Array, ""]) -> Blocks:
    """Returns the blocks in the slots from `first` on, in trees of the structure of `blocks`."""
    leaves = jax.tree.leaves(stacks)
    found = []
    for k, block in enumerate(blocks):
        ones = [lax.dynamic_index_in_dim(leaf, first + k, keepdims=False) for leaf in leaves]
        found.append(jax.tree.unflatten(jax.tree.structure(block), ones))
    return found


def add_to_blocks(gradients: nnx.State, by_blocks: Blocks, first: Int[Array, ""]) -> nnx.State:
    """Returns the gradients [slots, ...] of layers with those by blocks added in the slots from `first` on."""

    def add(total: Array, ones: Sequence[Array]) -> Array:
        before = lax.dynamic_slice_in_dim(total, first, len(ones))
        return lax.dynamic_update_slice_in_dim(total, before + jnp.stack(ones).astype(total.dtype), first, 0)

    return _with_blocks(add, gradients, by_blocks)


def _with_blocks(change: Callable[[Array, Sequence[Array]], Array], stacks: nnx.State, blocks: Blocks) -> nnx.State:
    """Returns every leaf of the stacks, changed by the same leaf of all blocks."""
    if not blocks:
        return stacks
    leaves, tree = jax.tree.flatten(stacks)
    of_blocks = zip(*map(jax.tree.leaves, blocks), strict=True)
    return jax.tree.unflatten(tree, [change(leaf, ones) for leaf, ones in zip(leaves, of_blocks, strict=True)])


def _is_last_stage() -> Array:
    return lax.axis_index(AXIS) == lax.axis_size(AXIS) - 1
