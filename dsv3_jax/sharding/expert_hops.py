"""The exchange of rows between ranks of the expert axis, forward and backward (report section 3.2.2).

A hop is an all-to-all among some of the ranks. Results return along the route that their rows took. The gradient of a
dispatch is therefore a combine, and the gradient of a combine is a dispatch, in the formats of section 3.3.3.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dsv3_jax.precision.dispatch import DispatchFormat
from dsv3_jax.precision.tiles import dequantize
from dsv3_jax.sharding.expert_layout import HopRanks

AXIS = "expert"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hop(HopRanks):
    """One exchange: its ranks, and the formats of the rows.

    Attributes:
      ragged: whether the backend sends each rank as many rows as there are, instead of equally many to all.
      tokens: format of dispatched tokens; None for the rows' own dtype.
      gradients: format of dispatched gradients of results; None for the rows' own dtype.
    """

    ragged: bool = False
    tokens: DispatchFormat | None = None
    gradients: DispatchFormat | None = None

    @property
    def index(self) -> Int[Array, ""]:
        """Returns this rank's index among its peers."""
        return lax.axis_index(AXIS) // self.stride % self.peers

    def all_to_all(self, x: Array) -> Array:
        """Sends equal parts of the leading axis, one to every peer."""
        return lax.all_to_all(x, AXIS, 0, 0, axis_index_groups=self.groups, tiled=True)

    def ragged_all_to_all(self, rows: Array, buffer_rows: int, *parts: Array) -> Array:
        """Sends slices of `rows` of different sizes, one to every peer; returns the receive buffer.

        Args:
          buffer_rows: rows of the receive buffer; those that nothing is written to are zero.
          parts: per peer, as `lax.ragged_all_to_all` takes them: starts and sizes of the slices, their starts in the
            receivers' buffers, and the sizes that arrive here.
        """
        buffer = jnp.zeros((buffer_rows, rows.shape[1]), rows.dtype)
        parts = tuple(part.astype(jnp.int32) for part in parts)
        return lax.ragged_all_to_all(rows, buffer, *parts, axis_name=AXIS, axis_index_groups=self.groups)


class Route(NamedTuple):
    """How many rows, sorted by receiver, each rank sends to each. The receive buffer has `slots` rows per sender.

    Attributes:
      sizes, starts: per receiver, number and first index of the rows to send.
      arriving: per sender, number of rows that arrive.
      starts_there: per sender, first index of those rows among all that the sender sends.
    """

    sizes: Int[Array, " P"]
    starts: Int[Array, " P"]
    arriving: Int[Array, " P"]
    starts_there: Int[Array, " P"]

    @classmethod
    def of(cls, hop: Hop, sizes: Int[Array, " P"]) -> Route:
        starts = jnp.cumsum(sizes) - sizes
        arriving, starts_there = jnp.moveaxis(hop.all_to_all(jnp.stack([sizes, starts], axis=1)), 1, 0)
        return cls(sizes, starts, arriving, starts_there)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def send(
    hop: Hop, slots: int, rows: Float[Array, "S d"], ids: Int[Array, "S K"], gates: Float[Array, "S K"], route: Route
) -> tuple[Float[Array, "M d"], Int[Array, "M K"], Float[Array, "M K"]]:
    """Dispatches rows with their experts and gates; returns the receive buffers, zero where no row arrived.

    Args:
      slots: the most rows that one rank sends to another.
      ids, gates: a row's experts (counted from 1) and their weights, at least float32; 0 for none.
    """
    beside = jnp.concatenate([ids.astype(gates.dtype), gates], axis=1)
    arrived, beside = _send_in_format(hop, slots, hop.tokens, rows, route, beside)
    chosen = ids.shape[1]
    return arrived, beside[:, :chosen].astype(ids.dtype), beside[:, chosen:]


def _send_forward(
    hop: Hop, slots: int, rows: Array, ids: Array, gates: Array, route: Route
) -> tuple[Any, tuple[Route, Array]]:
    return send(hop, slots, rows, ids, gates, route), (route, jnp.empty((rows.shape[0], 0)))


def _send_backward(
    hop: Hop, slots: int, residuals: tuple[Route, Array], bars: tuple[Array, Any, Array]
) -> tuple[Array, None, Array, None]:
    route, like_rows = residuals
    rows_bar, _, gates_bar = bars
    count = like_rows.shape[0]
    return (
        _send_rows_back(hop, slots, count, rows_bar, route),
        None,
        _send_rows_back(hop, slots, count, gates_bar, route),
        None,
    )


send.defvjp(_send_forward, _send_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def send_back(hop: Hop, slots: int, count: int, rows: Float[Array, "M d"], route: Route) -> Float[Array, "S d"]:
    """Returns rows of the receive buffer to their senders: `count` rows in the order they were sent, then zeros."""
    return _send_rows_back(hop, slots, count, rows, route)


def _send_back_forward(hop: Hop, slots: int, count: int, rows: Array, route: Route) -> tuple[Array, Route]:
    return send_back(hop, slots, count, rows, route), route


def _send_back_backward(hop: Hop, slots: int, count: int, route: Route, out_bar: Array) -> tuple[Array, None]:
    del count
    return _send_in_format(hop, slots, hop.gradients, out_bar, route)[0], None


send_back.defvjp(_send_back_forward, _send_back_backward)


def _send_in_format(
    hop: Hop, slots: int, wire: DispatchFormat | None, rows: Array, route: Route, beside: Array | None = None
) -> tuple[Float[Array, "M d"], Any]:
    """Sends rows in the format `wire`, and float32 numbers with them, together with the scales if there are any."""
    if wire is None:
        return _send_rows(hop, slots, rows, route), None if beside is None else _send_rows(hop, slots, beside, route)
    tiles = wire.quantize(rows)
    width = tiles.scales.shape[1]
    values = _send_rows(hop, slots, tiles.values, route)
    with_scales = tiles.scales if beside is None else jnp.concatenate([tiles.scales, beside], axis=1)
    with_scales = _send_rows(hop, slots, with_scales, route)
    arrived = dataclasses.replace(tiles, values=values, scales=with_scales[:, :width])
    return dequantize(arrived).astype(rows.dtype), with_scales[:, width:]


def _send_rows(hop: Hop, slots: int, rows: Float[Array, "S d"], route: Route) -> Float[Array, "M d"]:
    """Sends rows, sorted by receiver, into the slots that the receivers have for this sender."""
    buffer_rows = hop.peers * slots
    if hop.ragged:
        there = jnp.full(hop.peers, hop.index * slots)
        return hop.ragged_all_to_all(rows, buffer_rows, route.starts, route.sizes, there, route.arriving)
    at = jnp.arange(slots)
    source = jnp.minimum(route.starts[:, None] + at, rows.shape[0] - 1)
    sent = (at < route.sizes[:, None])[..., None]
    padded = jnp.where(sent, rows[source], jnp.zeros((), rows.dtype))
    return hop.all_to_all(padded).reshape(buffer_rows, -1)


def _send_rows_back(hop: Hop, slots: int, count: int, rows: Float[Array, "M d"], route: Route) -> Float[Array, "S d"]:
    """Sends each sender the rows of its slots."""
    if hop.ragged:
        here = jnp.arange(hop.peers) * slots
        return hop.ragged_all_to_all(rows, count, here, route.arriving, route.starts_there, route.sizes)
    padded = hop.all_to_all(rows.reshape(hop.peers, slots, -1))
    at = jnp.arange(count)
    receiver = jnp.searchsorted(route.starts + route.sizes, at, side="right")
    sent = receiver < hop.peers
    receiver = jnp.minimum(receiver, hop.peers - 1)
    came = padded[receiver, jnp.clip(at - route.starts[receiver], 0, slots - 1)]
    return jnp.where(sent[:, None], came, 0)
