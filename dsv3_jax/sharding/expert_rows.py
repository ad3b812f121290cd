"""Brings rows to the ranks of their experts, applies these, and returns the results (report section 3.2.2).

A row is sent with the ids of the experts it is for and with their gates. An id counts from 1 among the experts that the
remaining hops can reach, and 0 means none. One row returns: the gate-weighted sum of the results. Only the last hop may
take several rounds. Its first round is enough unless the load is very uneven.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dsv3_jax.precision.expert_networks import Weights
from dsv3_jax.precision.fp8_weight import add_gradients
from dsv3_jax.precision.prepared import QuantizedRows
from dsv3_jax.precision.tiles import Tiles
from dsv3_jax.sharding.expert_hops import Hop, Route, collect, dispatch
from dsv3_jax.sharding.expert_layout import SELDOM
from dsv3_jax.sharding.expert_products import ExpertsOfRank, apply_at_experts


def over_hops(
    hops: Sequence[Hop],
    experts: ExpertsOfRank,
    rows: Float[Array, "n d"] | QuantizedRows,
    ids: Int[Array, "n K"],
    gates: Float[Array, "n K"],
    weights: Weights,
    *,
    first_round: bool = True,
) -> Float[Array, "n d"]:
    """Returns sum_i g_i E_i(row) of every row, whose experts are reached by `hops`.

    Args:
      rows, ids, gates: the rows, the ids of their experts (0 for none), and their gates.
      weights: those of this rank's experts.
      first_round: whether to include what the first round of the last hop contributes.
    """
    if not hops:
        return apply_at_experts(experts, (rows, gates, ids), weights)
    hop, *others = hops
    route = Route.of(hop, ids)
    if others:
        arrived, own_gates, own_ids = dispatch(hop, rows, gates, route, 0)
        results = over_hops(others, experts, arrived, own_ids, own_gates, weights, first_round=first_round)
        return collect(hop, results, route, 0)
    further: Any = _further_rounds(hop, experts, *QuantizedRows.parts(rows), gates, route, weights)
    return further + _one_round(hop, experts, 0, rows, gates, route, weights) if first_round else further


def _one_round(
    hop: Hop,
    experts: ExpertsOfRank,
    index: Int[Array, ""] | int,
    rows: Float[Array, "n d"] | QuantizedRows,
    gates: Float[Array, "n K"],
    route: Route,
    weights: Weights,
) -> Float[Array, "n d"]:
    """Returns what a round of the last hop contributes."""
    results = apply_at_experts(experts, dispatch(hop, rows, gates, route, index), weights)
    return collect(hop, results, route, index)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _further_rounds(
    hop: Hop,
    experts: ExpertsOfRank,
    rows: Float[Array, "n d"],
    tiles: Tiles | None,
    gates: Float[Array, "n K"],
    route: Route,
    weights: Weights,
) -> Float[Array, "n d"]:
    """Returns what all rounds of the last hop but the first contribute; the backward pass computes them again."""
    experts = dataclasses.replace(experts, in_a_loop=True)

    def add(index: Int[Array, ""], total: Array) -> Array:
        return total + _one_round(hop, experts, index, QuantizedRows.joined(rows, tiles), gates, route, weights)

    with jax.named_scope(SELDOM):
        return lax.fori_loop(1, route.rounds, add, jnp.zeros_like(rows))


def _forward(hop: Hop, experts: ExpertsOfRank, *arguments: Any) -> tuple[Array, tuple[Any, ...]]:
    return _further_rounds(hop, experts, *arguments), arguments


def _backward(
    hop: Hop, experts: ExpertsOfRank, arguments: Any, out_bar: Array
) -> tuple[Array, None, Array, None, Weights]:
    rows, tiles, gates, route, weights = arguments
    experts = dataclasses.replace(experts, in_a_loop=True)

    def add(index: Int[Array, ""], totals: tuple[Array, Array, Weights]) -> tuple[Array, Array, Weights]:
        def contributed(rows: Array, gates: Array, weights: Weights) -> Array:
            return _one_round(hop, experts, index, QuantizedRows.joined(rows, tiles), gates, route, weights)

        return add_gradients(totals, jax.vjp(contributed, rows, gates, weights)[1](out_bar))

    with jax.named_scope(SELDOM):
        nothing = jax.tree.map(jnp.zeros_like, (rows, gates, weights))
        rows_bar, gates_bar, weights_bar = lax.fori_loop(1, route.rounds, add, nothing)
    return rows_bar, None, gates_bar, None, weights_bar


_further_rounds.defvjp(_forward, _backward)
