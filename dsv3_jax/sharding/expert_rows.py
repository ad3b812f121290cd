"""The work of one rank on rows that are dispatched to experts, and on their results (report section 3.2.2).

Before each hop a row is copied once for every rank it must reach. A row is sent with the ids of the experts it is for
and with their gates. An id counts from 1 among the experts that the remaining hops can reach, and 0 means none. One row
returns: the gate-weighted sum of the results.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import pallas_kernels
from dsv3_jax.modules.devices import ExpertProduct
from dsv3_jax.sharding.expert_hops import Hop, Route, send, send_back
from dsv3_jax.sharding.expert_products import ExpertsOfRank, Weights, apply_to_arrived


class Copies(NamedTuple):
    """Copies of rows, sorted by the rank that they are sent to; `route` says how many each rank gets.

    Attributes:
      rows, gates: the copies and the gates of their experts, which are differentiable.
      ids: of each copy's experts, the ids that count from 1 among those that the receiver leads to, 0 for none.
      route: how many rows are sent between which ranks.
      order: the order of the copies.
    """

    rows: Float[Array, "S d"]
    gates: Float[Array, "S K"]
    ids: Int[Array, "S K"]
    route: Route
    order: pallas_kernels.Permutation


def over_hops(
    hops: Sequence[Hop],
    rows: Float[Array, "n d"],
    ids: Int[Array, "n K"],
    gates: Float[Array, "n K"],
    weights: Weights,
    product: ExpertProduct,
) -> Float[Array, "n d"]:
    """Returns sum_i g_i E_i(row) of every row, whose experts are reached by `hops`.

    Args:
      rows, ids, gates: the rows, the ids of their experts (0 for none), and their gates.
      weights: those of this rank's experts, which `product` applies.
    """
    experts, even_load, chosen, sent = weights[0].shape[0], ids.size, ids.shape[1], []
    for hop, behind in zip(hops, experts_behind(hops, experts), strict=True):
        copies = copies_for(hop, rows, gates, ids, behind)
        rows, gates, ids = send_copies(hop, copies)
        sent.append(copies)
    results = apply_at_experts(rows, gates, ids, weights, ExpertsOfRank(product, experts, even_load))
    for hop, copies in zip(reversed(hops), reversed(sent), strict=True):
        results = collect(hop, chosen, results, copies.route, copies.order)
    return results


def experts_behind(hops: Sequence[Hop], experts: int) -> list[int]:
    """Returns for every hop how many experts each of its peers leads to, with so many on each rank."""
    return [math.prod((experts, *(hop.peers for hop in hops[index + 1 :]))) for index in range(len(hops))]


def copies_for(
    hop: Hop, rows: Float[Array, "n d"], gates: Float[Array, "n K"], ids: Int[Array, "n K"], behind: int
) -> Copies:
    """Returns the copies of rows to send; ranks tell each other how many there are.

    Args:
      behind: how many experts each peer leads to.
    """
    receiver = _receivers(ids, hop.peers, behind, hop.copies(ids.shape[1]))
    sent, order = pallas_kernels.permute(rows, receiver, hop.peers + 1, row_alignment=1)
    # Of each copy: which of the row's experts the receiver has.
    inside = ids[:, None] - receiver[..., None] * behind
    there = (ids[:, None] > 0) & (inside > 0) & (inside <= behind)
    wide = gates.astype(jnp.promote_types(gates.dtype, jnp.float32))
    sent_ids, sent_gates = (
        jnp.where(there, of_slot, 0).reshape(-1, ids.shape[1])[order.slot_of_row] for of_slot in (inside, wide[:, None])
    )
    return Copies(sent, sent_gates, sent_ids, Route.of(hop, order.group_sizes[:-1]), order)


def send_copies(hop: Hop, copies: Copies) -> tuple[Float[Array, "M d"], Float[Array, "M K"], Int[Array, "M K"]]:
    """Returns the rows that arrive, the gates of their experts, and the ids of these."""
    slots = copies.rows.shape[0] // hop.copies(copies.ids.shape[1])
    rows, ids, gates = send(hop, slots, copies.rows, copies.ids, copies.gates, copies.route)  # pyright: ignore[reportGeneralTypeIssues]
    return rows, gates, ids


def collect(
    hop: Hop, chosen: int, results: Float[Array, "M d"], route: Route, order: pallas_kernels.Permutation
) -> Float[Array, "n d"]:
    """Returns results to the senders of the rows, which add up those of each row's copies.

    Args:
      chosen: number of experts of each row, K.
    """
    count, copies = order.slot_of_row.shape[0], hop.copies(chosen)
    return _sums(copies, send_back(hop, count // copies, count, results, route), order)


def apply_at_experts(
    rows: Float[Array, "M d"],
    gates: Float[Array, "M K"],
    ids: Int[Array, "M K"],
    weights: Weights,
    experts: ExpertsOfRank,
) -> Float[Array, "M d"]:
    """Returns sum_i g_i E_i(row) of rows that are at the rank of their experts."""
    if experts.count < ids.shape[1]:
        ids, gates = _one_entry_per_expert(ids, gates, experts.count)
    return apply_to_arrived(experts, rows, gates, ids, weights)


def _one_entry_per_expert(
    ids: Int[Array, "M K"], gates: Float[Array, "M K"], experts: int
) -> tuple[Int[Array, "M E"], Float[Array, "M E"]]:
    """Rearranges ids and gates into one entry per expert, for ranks with fewer experts than entries per row."""
    expert = jnp.arange(1, experts + 1)
    chosen = ids[:, None] == expert[:, None]
    return jnp.where(jnp.any(chosen, axis=2), expert, 0), jnp.sum(jnp.where(chosen, gates[:, None], 0), axis=2)


def _receivers(ids: Int[Array, "n K"], peers: int, behind: int, copies: int) -> Int[Array, "n R"]:
    """Returns the distinct peers that lead to any of a row's experts, in order, padded with `peers`."""
    of_slot = jnp.sort(jnp.where(ids > 0, (ids - 1) // behind, peers), axis=1)
    again = jnp.pad(of_slot[:, 1:] == of_slot[:, :-1], ((0, 0), (1, 0)))
    return jnp.sort(jnp.where(again, peers, of_slot), axis=1)[:, :copies]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(copies: int, rows: Float[Array, "S d"], order: pallas_kernels.Permutation) -> Float[Array, "n d"]:
    """Returns the sum of the results of each row's copies, accumulated in float32.

    Unlike the gradient of `combine`, its gradient needs none of the rows: recomputing a piece in the backward pass does
    not send results back.
    """
    ones = jnp.ones((rows.shape[0] // copies, copies), jnp.float32)
    return pallas_kernels.combine(rows, ones, order)


def _sums_forward(
    copies: int, rows: Array, order: pallas_kernels.Permutation
) -> tuple[Array, pallas_kernels.Permutation]:
    return _sums(copies, rows, order), order


def _sums_backward(copies: int, order: pallas_kernels.Permutation, out_bar: Array) -> tuple[Array, None]:
    return out_bar[order.slot_of_row // copies], None


_sums.defvjp(_sums_forward, _sums_backward)
