"""The layers of one kind that a rank of a pipeline holds, with the two passes of one of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from dsv3_jax.modules.balance import Routing
from dsv3_jax.modules.block import BlockInputs
from dsv3_jax.modules.rematerialisation import rematerialise
from dsv3_jax.pipeline.residuals import TwoPasses
from dsv3_jax.pipeline.weights import with_gradients


@dataclasses.dataclass(frozen=True)
class StackedLayers:
    """The layers of one kind that a rank holds.

    Attributes:
      kind: their kind in the `SlotLayout`.
      params, rest: parameters and router biases, stacked: [layer slot, ...].
      passes: the forward and the backward pass of one layer: ((params), (rest, block inputs), h) -> ((h, balance term),
        load), the load being None for a dense layer.
    """

    kind: int
    params: nnx.State
    rest: nnx.State
    passes: TwoPasses

    @classmethod
    def of(
        cls,
        kind: int,
        graph: Any,
        params: nnx.State,
        rest: nnx.State,
        *,
        policy: str,
        balance_term: Callable[[Routing | None], Array],
        inputs: BlockInputs,
        h: Any,
    ) -> StackedLayers:
        """Returns layers that keep what a rematerialisation policy keeps.

        Args:
          graph: structure of a layer.
          inputs, h: the block inputs and hidden states of a micro-batch, or their shapes.
        """

        def layer(
            params: nnx.State, others: tuple[nnx.State, BlockInputs], h: Float[Array, "b T d"]
        ) -> tuple[tuple[Float[Array, "b T d"], Float[Array, ""]], Int[Array, " E"] | None]:
            rest, inputs = others
            out, statistics = nnx.merge(graph, params, rest)(h, inputs)
            routing = statistics.routing
            return (out, balance_term(routing)), None if routing is None else routing.load

        one, others = jax.eval_shape(_layer_at, params, rest, 0)
        return cls(kind, params, rest, TwoPasses.of(rematerialise(layer, policy), one, (others, inputs), h))

    @property
    def count(self) -> int:
        """The number of layer slots."""
        return jax.tree.leaves(self.params)[0].shape[0]

    def at(self, slot: Int[Array, ""], inputs: BlockInputs) -> tuple[nnx.State, tuple[nnx.State, BlockInputs]]:
        """Returns the first two arguments of `passes` for the layer in a slot."""
        params, rest = _layer_at(self.params, self.rest, slot)
        return params, (rest, inputs)


def _layer_at(params: nnx.State, rest: nnx.State, slot: Any) -> tuple[nnx.State, nnx.State]:
    """Returns parameters and router biases of the layer in a slot."""
    of_slot = functools.partial(lax.dynamic_index_in_dim, index=slot, keepdims=False)
    params, rest = jax.tree.map(of_slot, (params, rest))
    return with_gradients(params), rest
