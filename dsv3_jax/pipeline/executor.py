"""Runs a tick table on the stage axis of a mesh, as one compiled loop over its ticks (report section 3.2.1).

Every rank follows its own column of the table: at each tick it computes what its entry says, and then neighbours send
each other what is needed. The stages compute in loops and conditionals whose length and branch differ by rank, so that
an idle rank computes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dsv3_jax.pipeline.slots import Exchange, TickEntry, TickTable

AXIS = "stage"

Together = Callable[
    [TickEntry, Float[Array, "B T d"], Float[Array, "B T d"], Any],
    tuple[Float[Array, "B T d"], Float[Array, "B T d"], Any],
]
"""(this rank's entry, the stage's input, gradient by its output, carry) -> (input, gradient, carry).

All ranks call it at the beginning of a tick, before they compute what differs: no rank waits for another later.
"""

Compute = Callable[
    [TickEntry, Float[Array, "B T d"], Float[Array, "B T d"], Any],
    tuple[Float[Array, "B T d"], Float[Array, "B T d"], Any],
]
"""(this rank's entry, a stage's input, gradient by a stage's output, carry) -> (output, gradient by input, carry)."""


def run_ticks(
    table: TickTable,
    own: TickEntry,
    together: Together,
    compute: Compute,
    carry: Any,
    message: Float[Array, "B T d"],
) -> Any:
    """Runs all ticks, inside a `shard_map` that is manual over the stage axis.

    Args:
      table: the tick table of all ranks.
      own: this rank's part of `table.entries`: int32 [ticks, 1].
      together: computes what all ranks compute together: the input of the first stage, and the gradient by the output
        of the last. There its second array is the output itself when the backward for input begins.
      compute: computes the forward pass of one stage and the backward pass of one, as the entry says. If it says that
        there is nothing to do, the carry stays as it is.
      carry: what both read and write from tick to tick.
      message: an array of the shape, dtype and sharding of the activations and gradients that ranks send.

    Returns:
      The carry after the last tick.
    """
    exchanges = table.exchanges

    def tick(buffers: tuple[Array, Array, Any], entry: TickEntry) -> tuple[tuple[Array, Array, Any], None]:
        activations, gradients, carry = buffers
        h, g = _read(activations, entry.forward_input_slot), _read(gradients, entry.backward_gradient_slot)
        with jax.named_scope("together"):
            h, by_output, carry = together(entry, h, g, carry)
        output, by_input, carry = compute(entry, h, by_output, carry)
        with jax.named_scope("backward"):
            # A backward for weights finds the gradient here on every stage, the last one included.
            gradients = _write(gradients, entry.backward_gradient_slot, by_output)
            gradients = _write(gradients, entry.forward_output_slot, output)
        for exchange in exchanges:
            if exchange.of_activations:
                with jax.named_scope("send_activations"):
                    activations = _exchange(exchange, entry, output, activations)
            else:
                with jax.named_scope("send_gradients"):
                    gradients = _exchange(exchange, entry, by_input, gradients)
        return (activations, gradients, carry), None

    entries = jax.tree.map(lambda column: column[:, 0], own)
    start = (_buffer(message, table.slots.activations), _buffer(message, table.slots.gradients), carry)
    (_, _, carry), _ = lax.scan(tick, start, entries)
    return carry


def _exchange(
    exchange: Exchange, entry: TickEntry, sent: Float[Array, "B T d"], buffer: Float[Array, "slots B T d"]
) -> Float[Array, "slots B T d"]:
    """Returns the buffer with what the exchange brings; the same buffer in a tick that does not need it."""

    def received() -> Float[Array, "slots B T d"]:
        return _write(buffer, getattr(entry, exchange.field), lax.ppermute(sent, AXIS, exchange.pairs))

    return lax.cond(entry.exchanges & exchange.bit != 0, received, lambda: buffer)


def _buffer(message: Float[Array, "B T d"], slots: int) -> Float[Array, "slots B T d"]:
    """Returns a buffer of zeros with at least one slot."""
    return jnp.broadcast_to(jnp.zeros_like(message), (max(slots, 1), *message.shape))


def _read(buffer: Float[Array, "slots B T d"], slot: Int[Array, ""]) -> Float[Array, "B T d"]:
    """Returns the value in a slot; any value for slot -1."""
    return lax.dynamic_index_in_dim(buffer, jnp.maximum(slot, 0), keepdims=False)


def _write(
    buffer: Float[Array, "slots B T d"], slot: Int[Array, ""], value: Float[Array, "B T d"]
) -> Float[Array, "slots B T d"]:
    """Returns the buffer with `value` in the slot; the same buffer for slot -1."""
    index = jnp.maximum(slot, 0)
    value = jnp.where(slot >= 0, value, lax.dynamic_index_in_dim(buffer, index, keepdims=False))
    return lax.dynamic_update_index_in_dim(buffer, value, index, 0)
