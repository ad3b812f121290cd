"""Runs a pipeline schedule over the stage axis of a mesh: report section 3.2.1 as one compiled loop over its ticks.

Every rank follows its own row of the tables: it computes what its entry says (in loops and conditionals whose length
and branch differ by rank, so that an idle rank computes nothing), then all hand on what they computed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dsv3_jax.pipeline.slots import Lockstep, Places

AXIS = "stage"

Forward = Callable[[Lockstep, Float[Array, "B T d"], Any], tuple[Float[Array, "B T d"], Any]]
"""(this rank's entry of the tables, the stage's input, state) -> (its output, state)."""

Backward = Callable[[Lockstep, Float[Array, "B T d"], Any], tuple[Float[Array, "B T d"], Float[Array, "B T d"], Any]]
"""(entry, gradient by the stage's output, state) -> (gradient by its input, gradient by its output, state).

On the last stage the output itself comes in, and the gradient by it, with which the loss is done, takes its place: the
second half of a split backward pass finds a gradient there on every stage.
"""


def run_lockstep(
    tables: Lockstep,
    places: Places,
    mine: Lockstep,
    forward: Forward,
    backward: Backward,
    state: Any,
    message: Float[Array, "B T d"],
) -> Any:
    """All ticks, inside a `shard_map` that is manual over the stage axis.

    Args:
      tables: of all ranks, as numpy arrays.
      places: how many places they name.
      mine: the tables cut over the stage axis: int32 [ticks, 1].
      forward, backward: what a stage computes; nothing, with any result, where its entry says that there is nothing.
      state: whatever both read and write; carried from tick to tick.
      message: of the shape, dtype and sharding of what is handed on.

    Returns:
      The state after the last tick.
    """
    ranks = tables.forward.shape[1]
    used = {name: bool((table >= 0).any()) for name, table in vars(tables).items()}
    up = [(rank, rank + 1) for rank in range(ranks - 1)]
    down = [(rank + 1, rank) for rank in range(ranks - 1)]
    room = functools.partial(_room, message)

    def tick(carry: tuple[Array, Array, Any], at: Lockstep) -> tuple[tuple[Array, Array, Any], None]:
        activations, gradients, state = carry
        out, state = forward(at, _take(activations, at.forward_inbox), state)
        gradient, by_output, state = backward(at, _take(gradients, at.backward_inbox), state)
        gradients = _put(gradients, at.backward_inbox, by_output)
        gradients = _put(gradients, at.forward_out, out)
        for way, ring in (("up", up), ("down", down)):
            if used[f"arriving_activation_{way}"]:
                place = getattr(at, f"arriving_activation_{way}")
                activations = _put(activations, place, lax.ppermute(out, AXIS, ring))
            if used[f"arriving_gradient_{way}"]:
                place = getattr(at, f"arriving_gradient_{way}")
                gradients = _put(gradients, place, lax.ppermute(gradient, AXIS, ring))
        return (activations, gradients, state), None

    entries = jax.tree.map(lambda table: table[:, 0], mine)
    start = (room(places.activations), room(places.gradients), state)
    (_, _, state), _ = lax.scan(tick, start, entries)
    return state


def _room(message: Float[Array, "B T d"], places: int) -> Float[Array, "places B T d"]:
    return jnp.broadcast_to(jnp.zeros_like(message), (max(places, 1), *message.shape))


def _take(buffer: Float[Array, "places B T d"], place: Int[Array, ""]) -> Float[Array, "B T d"]:
    return lax.dynamic_index_in_dim(buffer, jnp.maximum(place, 0), keepdims=False)


def _put(
    buffer: Float[Array, "places B T d"], place: Int[Array, ""], value: Float[Array, "B T d"]
) -> Float[Array, "places B T d"]:
    """The buffer with `value` at `place`, or as it was."""
    at = jnp.maximum(place, 0)
    value = jnp.where(place >= 0, value, lax.dynamic_index_in_dim(buffer, at, keepdims=False))
    return lax.dynamic_update_index_in_dim(buffer, value, at, 0)
