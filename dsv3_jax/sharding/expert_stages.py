"""Applies experts to pieces of tokens in stages, so that products hide the exchange (report section 3.2.1).

Every hop of an exchange is a stage, and so are the products. In one iteration of a loop each stage works on another
piece: no exchange waits for another or for products, and the compiler can start all of them before the products and
wait for them behind. The backward pass has the same stages: rows are sent again, beside the gradients of their results,
and the gradients of rows are returned. The gradients of weights follow behind the loop, in one product over all pieces.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dsv3_jax.precision.expert_networks import WeightOperands, Weights
from dsv3_jax.precision.fp8_weight import add_gradients
from dsv3_jax.precision.prepared import QuantizedRows
from dsv3_jax.sharding.expert_hops import AXIS, Hop, Route, collect, gradient_of_collect, gradient_of_dispatch, send
from dsv3_jax.sharding.expert_layout import SELDOM
from dsv3_jax.sharding.expert_products import ExpertsOfRank, apply_at_experts, gradients_at_experts
from dsv3_jax.sharding.expert_rows import over_hops

Pieces = tuple[Float[Array, "pieces n d"], Int[Array, "pieces n K"], Float[Array, "pieces n K"]]
"""Tokens, the ids of their experts (0 for none), and gates."""


@dataclasses.dataclass(frozen=True)
class _Stage:
    """One hop of a piece.

    Attributes:
      prepare: what is done before any stage sends rows. It exchanges a few numbers, for which products would wait.
      run: sends rows; from what `prepare` returned to what the next stage is given.
    """

    prepare: Callable[[Any], Any]
    run: Callable[[Any], Any]

    @functools.cached_property
    def whole(self) -> Callable[[Any], Any]:
        """Both, compiled once for all uses."""
        return jax.jit(lambda state: self.run(self.prepare(state)))


@dataclasses.dataclass(frozen=True)
class TokenStages:
    """What the stages of all pieces have in common.

    Attributes:
      hops: the exchanges between ranks.
      experts: the experts of this rank.
      added: sums the outputs over ranks that each have a part of the experts' width.
    """

    hops: tuple[Hop, ...]
    experts: ExpertsOfRank
    added: Callable[[Array], Array]

    def beyond_first_rounds(
        self, u: Float[Array, "n d"], ids: Int[Array, "n K"], gates: Float[Array, "n K"], weights: Weights
    ) -> Float[Array, "n d"]:
        """Returns what further rounds of the last hop contribute to a piece of tokens."""
        return self.added(over_hops(self.hops, self.experts, u, ids, gates, weights, first_round=False))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def in_stages(stages: TokenStages, tokens: Pieces, weights: Weights) -> Float[Array, "pieces n d"]:
    """Returns sum_i g_i E_i(u) of every token; the backward pass computes all of it again.

    There must be more pieces than hops. Only first rounds of hops are in stages. Further ones follow behind all pieces.
    """
    laid_out = stages.experts.networks.laid_out(weights)

    def there(hop: Hop) -> _Stage:
        def prepare(state: tuple) -> tuple:
            rows, ids, gates, routes = state
            return rows, gates, (*routes, Route.of(hop, ids))

        def run(prepared: tuple) -> tuple:
            rows, gates, routes = prepared
            arrived, own_gates, own_ids = send(hop, rows, gates, routes[-1], 0)
            return arrived, own_ids, own_gates, routes

        return _Stage(prepare, run)

    def products(none: tuple, state: tuple) -> tuple[tuple, tuple, tuple]:
        rows, ids, gates, routes = state
        rows = rows if isinstance(rows, jax.Array) else QuantizedRows.of(rows, tokens[0].dtype)
        results = apply_at_experts(stages.experts, (rows, gates, ids), laid_out)
        return none, (results, routes, routes[-1].rounds), ()

    def back(hop: Hop) -> _Stage:
        def run(state: tuple) -> tuple:
            results, (*routes, route), rounds = state
            out: Any = collect(hop, results, route, 0)
            return stages.added(out) if hop is stages.hops[0] else out, tuple(routes), rounds

        return _Stage(lambda state: state, run)

    before, after = [there(hop) for hop in stages.hops], [back(hop) for hop in reversed(stages.hops)]
    _, (out, _, rounds), _ = _run(before, products, after, (*tokens, ()), ())

    def add(piece: tuple, index: Int[Array, ""], out: Array) -> Array:
        u, ids, gates = piece
        return out.at[index].add(stages.beyond_first_rounds(u, ids, gates, weights))

    return _for_further_rounds(add, tokens, rounds, out)


def _forward(stages: TokenStages, tokens: Pieces, weights: Weights) -> tuple[Array, tuple]:
    return in_stages(stages, tokens, weights), (tokens, weights)


def _backward(stages: TokenStages, saved: tuple, out_bar: Array) -> tuple[tuple[Array, None, Array], Weights]:
    tokens, weights = saved
    networks = stages.experts.networks
    laid_out = networks.laid_out(weights)

    def there(hop: Hop) -> _Stage:
        def prepare(state: tuple) -> tuple:
            rows, ids, gates, bar, routes = state
            return rows, gates, bar, (*routes, Route.of(hop, ids))

        def run(prepared: tuple) -> tuple:
            rows, gates, bar, routes = prepared
            if hop is stages.hops[0]:
                (bar,) = jax.linear_transpose(stages.added, bar)(bar)
            arrived, own_gates, own_ids = send(hop, rows, gates, routes[-1], 0)
            return arrived, own_ids, own_gates, gradient_of_collect(hop, bar, routes[-1], 0), routes

        return _Stage(prepare, run)

    def products(total: Weights, state: tuple) -> tuple[Weights, tuple, WeightOperands]:
        rows, ids, gates, results_bar, routes = state
        rows = rows if isinstance(rows, jax.Array) else QuantizedRows.of(rows, tokens[0].dtype)
        *bars, operands, total = gradients_at_experts(stages.experts, (rows, gates, ids), laid_out, results_bar, total)
        return total, (*bars, routes, routes[-1].rounds), operands

    def back(hop: Hop) -> _Stage:
        def run(state: tuple) -> tuple:
            rows_bar, gates_bar, (*routes, route), rounds = state
            return *gradient_of_dispatch(hop, rows_bar, gates_bar, route, 0), tuple(routes), rounds

        return _Stage(lambda state: state, run)

    before, after = [there(hop) for hop in stages.hops], [back(hop) for hop in reversed(stages.hops)]
    total = jax.tree.map(jnp.zeros_like, weights)
    total, (u_bar, gates_bar, _, rounds), operands = _run(before, products, after, (*tokens, out_bar, ()), total)
    # One product over the rows of all pieces, instead of one for each piece and their sum.
    total = networks.add_weight_gradients(total, operands, stages.experts.alignment)

    def add(piece: tuple, index: Int[Array, ""], bars: tuple[Array, Array, Weights]) -> tuple[Array, Array, Weights]:
        u, ids, gates, bar = piece

        def contributed(u: Array, gates: Array, weights: Weights) -> Array:
            return stages.beyond_first_rounds(u, ids, gates, weights)

        u_more, gates_more, weights_more = jax.vjp(contributed, u, gates, weights)[1](bar)
        u_bar, gates_bar, total = bars
        gates_bar = gates_bar.at[index].add(gates_more.astype(gates_bar.dtype))
        return u_bar.at[index].add(u_more), gates_bar, add_gradients(total, weights_more)

    u_bar, gates_bar, total = _for_further_rounds(add, (*tokens, out_bar), rounds, (u_bar, gates_bar, total))
    return (u_bar, None, gates_bar.astype(tokens[2].dtype)), total


in_stages.defvjp(_forward, _backward)


def _for_further_rounds(
    add: Callable[[Any, Int[Array, ""], Any], Any], pieces: Any, rounds: Int[Array, " pieces"], total: Any
) -> Any:
    """Returns add(piece, its index, total) over all pieces of which any rank needs more than one round."""
    needed = lax.pmax(rounds, AXIS) > 1

    def of_piece(index: Int[Array, ""], total: Any) -> Any:
        piece = jax.tree.map(lambda part: lax.dynamic_index_in_dim(part, index, keepdims=False), pieces)
        return lax.cond(needed[index], lambda total: add(piece, index, total), lambda total: total, total)

    with jax.named_scope(SELDOM):
        return lax.fori_loop(0, jnp.where(jnp.any(needed), len(rounds), 0), of_piece, total)


def _run(
    before: Sequence[_Stage],
    products: Callable[[Any, Any], tuple[Any, Any, Any]],
    after: Sequence[_Stage],
    pieces: Any,
    total: Any,
) -> tuple[Any, Any, Any]:
    """Returns the last `total`, what the last stage returns of all pieces, and what the products return besides.

    Args:
      before, after: the stages before and behind the products, equally many.
      products: (total, what the last stage before it returned) -> (total, what the next stage is given, others).
      pieces: arrays with a leading axis of more pieces than there are stages before the products.
    """
    depth = len(before)
    states: list[Any] = []
    for index in range(depth):
        piece = jax.tree.map(lambda part, index=index: part[index], pieces)
        states = [stage.whole(state) for stage, state in zip(before, (piece, *states), strict=False)]
    # Where there is no piece, a stage is given zeros, for which it sends nothing.
    shape = jax.eval_shape(products, total, states[-1])[1]
    for stage in after:
        states.append(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shape))
        shape = jax.eval_shape(stage.whole, shape)

    def step(carry: tuple[Any, list[Any]], piece: Any) -> tuple[tuple[Any, list[Any]], Any]:
        total, states = carry
        inputs = (piece, *states)
        prepared = [stage.prepare(state) for stage, state in zip(before, inputs, strict=False)]
        # All have exchanged their numbers of rows before any product begins.
        prepared, arrived, *returning = lax.optimization_barrier((prepared, *inputs[depth:]))
        outs = [stage.run(state) for stage, state in zip(before, prepared, strict=True)]
        total, results, others = products(total, arrived)
        returned = [stage.run(state) for stage, state in zip(after, returning, strict=True)]
        *states, out = (*outs, results, *returned)
        return (total, states), (out, others)

    def following(part: Array) -> Array:
        return jnp.concatenate([part[depth:], jnp.zeros_like(part[:depth])])

    (total, states), (outs, others) = lax.scan(step, (total, states), jax.tree.map(following, pieces))
    left, ends = states[depth:], []
    for index in range(depth):
        *left, end = (stage.whole(state) for stage, state in zip(after[index:], left, strict=True))
        ends.append(end)
    outs = jax.tree.map(lambda out, *ends: jnp.concatenate([out[depth:], jnp.stack(ends)]), outs, *ends)
    return total, outs, others
