"""Applies experts to pieces of tokens in stages, so that products hide the exchange (report section 3.2.1).

Every hop of an exchange is a stage, and so are the products. In one iteration of a loop each stage works on another
piece: no exchange waits for another or for products, and the compiler can start all of them before the products and
wait for them behind. The backward pass has the same stages: rows are sent again, beside the gradients of their results,
and the gradients of rows are returned.
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

from dsv3_jax.modules.devices import ExpertProduct
from dsv3_jax.precision.fp8_weight import add_gradients
from dsv3_jax.sharding.expert_hops import Hop
from dsv3_jax.sharding.expert_products import ExpertsOfRank, Weights
from dsv3_jax.sharding.expert_rows import Copies, apply_at_experts, collect, copies_for, experts_behind, send_copies

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
      experts: number of experts per rank.
      product: applies experts.
      added: sums the outputs over ranks that each have a part of the experts' width.
      shape: numbers of tokens of a piece and of experts per token.
    """

    hops: Sequence[Hop]
    experts: int
    product: ExpertProduct
    added: Callable[[Array], Array]
    shape: tuple[int, ...]

    @property
    def hops_behind(self) -> list[tuple[Hop, int]]:
        """The hops, each with the number of experts that one of its peers leads to."""
        return list(zip(self.hops, experts_behind(self.hops, self.experts), strict=True))

    def multiply(
        self, rows: Float[Array, "M d"], gates: Float[Array, "M K"], ids: Int[Array, "M K"], weights: Weights
    ) -> Float[Array, "M d"]:
        """Applies this rank's experts to the rows that arrived."""
        experts = ExpertsOfRank(self.product, self.experts, even_load=self.shape[0] * self.shape[1])
        return apply_at_experts(rows, gates, ids, weights, experts)

    def collect(self, hop: Hop, results: Float[Array, "M d"], route: tuple) -> Float[Array, "n d"]:
        """Returns results over one hop, and adds them up; those of the first hop are the outputs."""
        out = collect(hop, self.shape[1], results, *route)
        return self.added(out) if hop is self.hops[0] else out


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def in_stages(stages: TokenStages, tokens: Pieces, weights: Weights) -> Float[Array, "pieces n d"]:
    """Returns sum_i g_i E_i(u) of every token; the backward pass computes all of it again.

    There must be more pieces than hops.
    """

    def there(hop: Hop, behind: int) -> _Stage:
        def prepare(state: tuple) -> tuple[Copies, tuple]:
            rows, ids, gates, routes = state
            copies = copies_for(hop, rows, gates, ids, behind)
            return copies, (*routes, (copies.route, copies.order))

        def run(prepared: tuple[Copies, tuple]) -> tuple:
            copies, routes = prepared
            rows, gates, ids = send_copies(hop, copies)
            return rows, ids, gates, routes

        return _Stage(prepare, run)

    def back(hop: Hop) -> _Stage:
        def run(state: tuple) -> tuple:
            results, (*routes, route) = state
            return stages.collect(hop, results, route), tuple(routes)

        return _Stage(lambda state: state, run)

    def products(none: tuple, state: tuple) -> tuple[tuple, Any]:
        rows, ids, gates, routes = state
        return none, (stages.multiply(rows, gates, ids, weights), routes)

    before = [there(hop, behind) for hop, behind in stages.hops_behind]
    after = [back(hop) for hop in reversed(stages.hops)]
    return _run(before, products, after, (*tokens, ()), ())[1][0]


def _forward(stages: TokenStages, tokens: Pieces, weights: Weights) -> tuple[Array, tuple]:
    return in_stages(stages, tokens, weights), (tokens, weights)


def _backward(stages: TokenStages, saved: tuple, out_bar: Array) -> tuple[tuple[Array, None, Array], Weights]:
    tokens, weights = saved
    trees: dict[Any, Any] = {}  # of what `jax.vjp` returns, whose leaves are handed from stage to stage

    def vjp(key: Any, function: Callable[..., Any], *primals: Array) -> tuple[Any, list[Array], Any]:
        out, pull, more = jax.vjp(function, *primals, has_aux=True)
        leaves, trees[key] = jax.tree.flatten(pull)
        return out, leaves, more

    def there(index: int, hop: Hop, behind: int) -> _Stage:
        def prepare(state: tuple) -> tuple:
            rows, ids, gates, results_bar, pulls = state

            def copy(rows: Array, gates: Array) -> tuple[tuple[Array, Array], tuple]:
                copies = copies_for(hop, rows, gates, ids, behind)
                return copies[:2], copies[2:]

            sent, leaves, others = vjp((index, "copy"), copy, rows, gates)
            return sent, others, results_bar, (*pulls, leaves)

        def run(prepared: tuple) -> tuple:
            sent, others, results_bar, pulls = prepared

            def send(rows: Array, gates: Array) -> tuple[tuple[Array, Array], Array]:
                rows, gates, ids = send_copies(hop, Copies(rows, gates, *others))
                return (rows, gates), ids

            (rows, gates), leaves, ids = vjp((index, "send"), send, *sent)
            # Of the results only the shape is read.
            results = jnp.zeros(rows.shape, results_bar.dtype)
            _, pull = jax.vjp(lambda results: stages.collect(hop, results, others[1:]), results)
            return rows, ids, gates, pull(results_bar)[0], (*pulls, leaves)

        return _Stage(prepare, run)

    def back(index: int) -> _Stage:
        def run(state: tuple) -> tuple:
            bars, (*pulls, copying, sending) = state
            for key, leaves in ("send", sending), ("copy", copying):
                bars = jax.tree.unflatten(trees[index, key], leaves)(bars)
            return bars, tuple(pulls)

        return _Stage(lambda state: state, run)

    def products(total: Weights, state: tuple) -> tuple[Weights, tuple]:
        rows, ids, gates, results_bar, pulls = state
        _, pull = jax.vjp(lambda rows, gates, weights: stages.multiply(rows, gates, ids, weights), rows, gates, weights)
        *bars, weights_bar = pull(results_bar)
        return add_gradients(total, weights_bar), (tuple(bars), pulls)

    before = [there(index, *hop) for index, hop in enumerate(stages.hops_behind)]
    after = [back(index) for index in reversed(range(len(before)))]
    total = jax.tree.map(jnp.zeros_like, weights)
    total, ((u_bar, gates_bar), _) = _run(before, products, after, (*tokens, out_bar, ()), total)
    return (u_bar, None, gates_bar), total


in_stages.defvjp(_forward, _backward)


def _run(
    before: Sequence[_Stage],
    products: Callable[[Any, Any], tuple[Any, Any]],
    after: Sequence[_Stage],
    pieces: Any,
    total: Any,
) -> tuple[Any, Any]:
    """Returns the last `total`, and what the last stage returns of all pieces, stacked.

    Args:
      before, after: the stages before and behind the products, equally many.
      products: (total, what the last stage before it returned) -> (total, what the next stage is given).
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
        total, results = products(total, arrived)
        returned = [stage.run(state) for stage, state in zip(after, returning, strict=True)]
        *states, out = (*outs, results, *returned)
        return (total, states), out

    def following(part: Array) -> Array:
        return jnp.concatenate([part[depth:], jnp.zeros_like(part[:depth])])

    (total, states), outs = lax.scan(step, (total, states), jax.tree.map(following, pieces))
    left, ends = states[depth:], []
    for index in range(depth):
        *left, end = (stage.whole(state) for stage, state in zip(after[index:], left, strict=True))
        ends.append(end)
    return total, jax.tree.map(lambda out, *ends: jnp.concatenate([out[depth:], jnp.stack(ends)]), outs, *ends)
