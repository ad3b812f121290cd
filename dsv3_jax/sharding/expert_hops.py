"""How rows travel between ranks of the expert axis, forward and backward (report section 3.2.2).

A hop is an all-to-all among some of the ranks. Rows that go out together come back together, so that the gradient of
the way there travels as results do, and the gradient of the way back as tokens do, in the formats of section 3.3.3.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dsv3_jax.precision.dispatch import TravelFormat
from dsv3_jax.precision.tiles import dequantise
from dsv3_jax.sharding.expert_layout import HopRanks

AXIS = "expert"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hop(HopRanks):
    """Which ranks send to one another, and in what form.

    Attributes:
      ragged: the backend sends as many rows to each as there are, instead of equally many to all.
      tokens, gradients: format of the way there, and of gradients of what comes back; None for that of the rows.
    """

    ragged: bool = False
    tokens: TravelFormat | None = None
    gradients: TravelFormat | None = None

    @property
    def index(self) -> Int[Array, ""]:
        """This rank's among its peers."""
        return lax.axis_index(AXIS) // self.stride % self.peers

    def all_to_all(self, x: Array) -> Array:
        """Equal parts of the leading axis, one to every peer."""
        return lax.all_to_all(x, AXIS, 0, 0, axis_index_groups=self.groups, tiled=True)

    def ragged_all_to_all(self, rows: Array, room: int, *parts: Array) -> Array:
        """`parts`: starts and sizes here, starts at the receivers, sizes that arrive; other places are zero."""
        buffer = jnp.zeros((room, rows.shape[1]), rows.dtype)
        parts = tuple(part.astype(jnp.int32) for part in parts)
        return lax.ragged_all_to_all(rows, buffer, *parts, axis_name=AXIS, axis_index_groups=self.groups)


class Route(NamedTuple):
    """Rows sorted by receiver, and where they go. The receive buffer has `slots` places for each sender's.

    Attributes:
      sizes, starts: [receiver] of the rows to send.
      arriving: [sender] rows that come.
      starts_there: [sender] where those stand among what the sender sends.
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
    """Rows, with what each is to do there, to the receivers; zeros at places where none arrives.

    Args:
      slots: the most rows from one rank to another.
      ids, gates: a row's experts (counted from 1) and their weights, at least float32; 0 for none.
    """
    beside = jnp.concatenate([ids.astype(gates.dtype), gates], axis=1)
    arrived, beside = _carry_as(hop, slots, hop.tokens, rows, route, beside)
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
    return _carry_back(hop, slots, count, rows_bar, route), None, _carry_back(hop, slots, count, gates_bar, route), None


send.defvjp(_send_forward, _send_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def send_back(hop: Hop, slots: int, count: int, rows: Float[Array, "M d"], route: Route) -> Float[Array, "S d"]:
    """Rows in the places they arrived at, to where they came from: `count` in the order they were sent, then zeros."""
    return _carry_back(hop, slots, count, rows, route)


def _send_back_forward(hop: Hop, slots: int, count: int, rows: Array, route: Route) -> tuple[Array, Route]:
    return send_back(hop, slots, count, rows, route), route


def _send_back_backward(hop: Hop, slots: int, count: int, route: Route, out_bar: Array) -> tuple[Array, None]:
    del count
    return _carry_as(hop, slots, hop.gradients, out_bar, route)[0], None


send_back.defvjp(_send_back_forward, _send_back_backward)


def _carry_as(
    hop: Hop, slots: int, wire: TravelFormat | None, rows: Array, route: Route, beside: Array | None = None
) -> tuple[Float[Array, "M d"], Any]:
    """Rows in that format, and float32 numbers beside them, which go with the scales where there are any."""
    if wire is None:
        return _carry(hop, slots, rows, route), None if beside is None else _carry(hop, slots, beside, route)
    tiles = wire.quantise(rows)
    width = tiles.scales.shape[1]
    values = _carry(hop, slots, tiles.values, route)
    with_scales = tiles.scales if beside is None else jnp.concatenate([tiles.scales, beside], axis=1)
    with_scales = _carry(hop, slots, with_scales, route)
    arrived = dataclasses.replace(tiles, values=values, scales=with_scales[:, :width])
    return dequantise(arrived).astype(rows.dtype), with_scales[:, width:]


def _carry(hop: Hop, slots: int, rows: Float[Array, "S d"], route: Route) -> Float[Array, "M d"]:
    """Rows sorted by receiver, to places of their sender's."""
    room = hop.peers * slots
    if hop.ragged:
        there = jnp.full(hop.peers, hop.index * slots)
        return hop.ragged_all_to_all(rows, room, route.starts, route.sizes, there, route.arriving)
    at = jnp.arange(slots)
    source = jnp.minimum(route.starts[:, None] + at, rows.shape[0] - 1)
    sent = (at < route.sizes[:, None])[..., None]
    padded = jnp.where(sent, rows[source], jnp.zeros((), rows.dtype))
    return hop.all_to_all(padded).reshape(room, -1)


def _carry_back(hop: Hop, slots: int, count: int, rows: Float[Array, "M d"], route: Route) -> Float[Array, "S d"]:
    """From places of their sender's, to their sender."""
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
