"""The routed experts on a CPU while decoding: a loop over blocks of rows that chose the same expert.

Only the chosen experts' weights are read. A block of plain weights has at least two rows, because XLA's CPU backend
multiplies a single row by another kernel that adds in another order. A row's result is then the same bits whatever the
other rows.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dsv3_jax.modules.ordered_sum import ordered_sum

_MOST_ROWS = 64


def blocks_of_experts(
    u: Float[Array, "N d"],
    expert_index: Int[Array, "N K"],
    gates: Float[Array, "N K"],
    experts: int,
    product: Callable[[Float[Array, "R d"], Int[Array, ""]], Float[Array, "R d"]],
    *,
    fewest_rows: int,
) -> Float[Array, "N d"]:
    """Returns sum_k gates[n, k] * product(u[n], expert_index[n, k]) of every token n, summed in at least float32.

    Args:
      expert_index: chosen experts; the largest int32 where nothing is to be computed, which needs a gate of zero.
      experts: number of experts that the tokens choose from. It decides the size of the blocks, not the result.
      product: computes one expert for a block of rows.
      fewest_rows: of a block; a power of two.
    """
    chosen = expert_index.shape[1]
    slots = expert_index.size
    block = fewest_rows
    while block < min(2 * slots // experts, _MOST_ROWS):
        block *= 2

    slot = jnp.argsort(expert_index.reshape(-1), stable=True)
    expert = expert_index.reshape(-1)[slot]
    rank = jnp.arange(slots) - jnp.searchsorted(expert, expert, side="left")
    begins = (rank % block == 0) & (expert < jnp.iinfo(jnp.int32).max)
    starts = jnp.nonzero(begins, size=slots, fill_value=0)[0]
    rows = jnp.pad(u[slot // chosen], ((0, block), (0, 0)))

    def multiply(i: Int[Array, ""], out: Float[Array, "rows d"]) -> Float[Array, "rows d"]:
        # A block may end in rows of the next experts; the blocks of those come later and overwrite them.
        start = starts[i]
        own = lax.dynamic_slice_in_dim(rows, start, block)
        return lax.dynamic_update_slice_in_dim(out, product(own, expert[start]), start, axis=0)

    out = lax.fori_loop(0, jnp.sum(begins), multiply, jnp.zeros_like(rows))
    row_of_slot = jnp.zeros_like(slot).at[slot].set(jnp.arange(slots), unique_indices=True)
    wide = jnp.promote_types(u.dtype, jnp.float32)
    own = out[row_of_slot].reshape(-1, chosen, u.shape[1]).astype(wide) * gates[..., None].astype(wide)
    return ordered_sum(own.swapaxes(1, 2)).astype(u.dtype)
