"""The routed experts on a CPU while decoding: all in one product, those of each row in one, or one after the other.

Many tokens choose nearly all experts. Each expert is then given as many rows, some of them padding, and one batched
product reads all weights where they are. For few tokens the weights of each row's expert are gathered. Tokens for which
the rows of their experts do not suffice are computed in a loop over blocks of rows that chose the same expert, and so
are all with plain weights. A row's result is the same bits in each way, whatever the other rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dsv3_jax.modules.ordered_sum import ordered_sum

NO_EXPERT = jnp.iinfo(jnp.int32).max
"""Stands in place of an expert's number where nothing is to be computed."""

_MOST_ROWS = 64  # of a block
_ROW_STEP = 8  # rows of an expert in the batched product are a multiple of it


@dataclasses.dataclass(frozen=True)
class ExpertProducts:
    """The networks of a layer's experts.

    Attributes:
      experts: how many there are.
      of_one: applies the expert of a number to rows [R, d].
      of_all: applies every expert to its rows [E, R, d]; None where only `of_one` gives a row the same bits for any
        number of rows.
      of_rows: applies to each row of [S, d] the expert whose number [S] it has; None as `of_all`.
      fewest_rows: of a block for `of_one`; a power of two. XLA's CPU backend multiplies a single row by another kernel,
        which adds in another order.
    """

    experts: int
    of_one: Callable[[Float[Array, "R d"], Int[Array, ""]], Float[Array, "R d"]]
    of_all: Callable[[Float[Array, "E R d"]], Float[Array, "E R d"]] | None
    of_rows: Callable[[Float[Array, "S d"], Int[Array, " S"]], Float[Array, "S d"]] | None
    fewest_rows: int


def apply_experts(
    u: Float[Array, "N d"], expert_index: Int[Array, "N K"], gates: Float[Array, "N K"], products: ExpertProducts
) -> Float[Array, "N d"]:
    """Returns sum_k gates[n, k] * FFN_k(u[n]) of every token n, summed in at least float32.

    Args:
      expert_index: chosen experts k; `NO_EXPERT`, with a gate of zero, where nothing is to be computed.
    """
    # With as many slots as experts two thirds of them or more are chosen.
    if products.of_all is not None and expert_index.size >= products.experts:
        outputs = _at_once(u, expert_index, products, products.of_all)
    elif products.of_rows is not None:
        rows = jnp.repeat(u, expert_index.shape[1], axis=0)
        found = products.of_rows(rows, jnp.minimum(expert_index.reshape(-1), products.experts - 1))
        outputs = found.reshape(*expert_index.shape, -1)
    else:
        outputs = _in_blocks(u, expert_index, products)
    wide = jnp.promote_types(u.dtype, jnp.float32)
    return ordered_sum((outputs.astype(wide) * gates[..., None].astype(wide)).swapaxes(1, 2)).astype(u.dtype)


def _at_once(
    u: Float[Array, "N d"],
    expert_index: Int[Array, "N K"],
    products: ExpertProducts,
    of_all: Callable[[Float[Array, "E R d"]], Float[Array, "E R d"]],
) -> Float[Array, "N K d"]:
    """Returns the outputs of the chosen experts, zeros where there is none.

    An expert has half as many rows again as if all were chosen equally often.
    """
    experts, chosen = products.experts, expert_index.shape[1]
    rows = _ROW_STEP * -(-3 * expert_index.size // (2 * experts * _ROW_STEP))
    slots = expert_index.reshape(-1)
    is_of = slots[:, None] == jnp.arange(experts)
    rank = jnp.sum(jnp.where(is_of, jnp.cumsum(is_of, axis=0) - 1, 0), axis=1)
    fits = (slots < experts) & (rank < rows)
    row_of_slot = jnp.where(fits, slots * rows + rank, experts * rows)
    token_of_row = jnp.full(experts * rows, len(u)).at[row_of_slot].set(jnp.arange(len(slots)) // chosen, mode="drop")
    given = u.at[token_of_row].get(mode="fill", fill_value=0)
    outputs = of_all(given.reshape(experts, rows, -1)).reshape(experts * rows, -1)

    late = jnp.where(fits, NO_EXPERT, slots).reshape(expert_index.shape)
    others = lax.cond(
        jnp.any(late < experts),
        lambda: _in_blocks(u, late, products),
        lambda: jnp.zeros((*expert_index.shape, u.shape[1]), u.dtype),
    )
    own = outputs.at[row_of_slot].get(mode="fill", fill_value=0).reshape(others.shape)
    return jnp.where(fits.reshape(*expert_index.shape, 1), own, others)


def _in_blocks(
    u: Float[Array, "N d"], expert_index: Int[Array, "N K"], products: ExpertProducts
) -> Float[Array, "N K d"]:
    """Returns the outputs of the chosen experts, zeros where there is none."""
    chosen, slots = expert_index.shape[1], expert_index.size
    block = products.fewest_rows
    while block < min(2 * slots // products.experts, _MOST_ROWS):
        block *= 2

    slot = jnp.argsort(expert_index.reshape(-1), stable=True)
    expert = expert_index.reshape(-1)[slot]
    rank = jnp.arange(slots) - jnp.searchsorted(expert, expert, side="left")
    begins = (rank % block == 0) & (expert < NO_EXPERT)
    starts = jnp.nonzero(begins, size=slots, fill_value=0)[0]
    rows = jnp.pad(u[slot // chosen], ((0, block), (0, 0)))

    def multiply(i: Int[Array, ""], out: Float[Array, "rows d"]) -> Float[Array, "rows d"]:
        # A block may end in rows of the next experts; the blocks of those come later and overwrite them.
        start = starts[i]
        own = lax.dynamic_slice_in_dim(rows, start, block)
        return lax.dynamic_update_slice_in_dim(out, products.of_one(own, expert[start]), start, axis=0)

    out = lax.fori_loop(0, jnp.sum(begins), multiply, jnp.zeros_like(rows))
    row_of_slot = jnp.zeros_like(slot).at[slot].set(jnp.arange(slots), unique_indices=True)
    return out[row_of_slot].reshape(*expert_index.shape, u.shape[1])
