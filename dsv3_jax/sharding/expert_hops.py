"""The exchange of rows between ranks of the expert axis, forward and backward (report section 3.2.2).

A hop is an all-to-all among some of the ranks. Before it a row is copied once for every rank that it must reach.
Results return along the route that their rows took, and those of a row's copies are added up. The gradient of a
dispatch is therefore a combine, and the gradient of a combine is a dispatch, in the formats of section 3.3.3. What is
sent in FP8 is quantized once by its first sender, and products multiply by the tiles that arrive.

A rank has memory for so many rows of each sender. Where one sends more, these follow in further rounds.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

import pallas_kernels
from dsv3_jax.precision.dispatch import DispatchFormat
from dsv3_jax.precision.prepared import QuantizedRows
from dsv3_jax.precision.tiles import Tiles, dequantize
from dsv3_jax.sharding.expert_layout import HopRanks

AXIS = "expert"

_NEVER_SENT = 8  # rows of zeros behind those that return, which stand for copies that another round sends


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hop(HopRanks):
    """One exchange: its ranks, and the formats of the rows.

    Attributes:
      most: the most rows that a rank sends to another in one round.
      behind: number of experts that each peer leads to.
      ragged: whether the backend sends each rank as many rows as there are, instead of equally many to all.
      tokens: format of dispatched tokens; None for the rows' own dtype.
      gradients: format of dispatched gradients of results; None for the rows' own dtype.
    """

    most: int
    behind: int
    ragged: bool = False
    tokens: DispatchFormat | None = None
    gradients: DispatchFormat | None = None

    @property
    def rows(self) -> int:
        """Rows of a receive buffer."""
        return self.peers * self.most

    @property
    def index(self) -> Int[Array, ""]:
        """Returns this rank's index among its peers."""
        return lax.axis_index(AXIS) // self.stride % self.peers

    def all_to_all(self, x: Array) -> Array:
        """Sends equal parts of the leading axis, one to every peer."""
        return lax.all_to_all(x, AXIS, 0, 0, axis_index_groups=self.groups, tiled=True)

    def exchange(self, x: Array, sizes: Int[Array, " P"], arriving: Int[Array, " P"], more: int = 0) -> Array:
        """Returns what the peers send to this rank.

        Args:
          x: [rows, ...]: of `most` rows for each peer the first `sizes` are sent; the others are zeros.
          arriving: how many rows each peer sends.
          more: rows of zeros behind.

        Returns:
          [rows + more, ...]: of `most` rows from each peer the first have arrived; the others are zeros.
        """
        if not self.ragged:
            return jnp.pad(self.all_to_all(x), ((0, more), *[(0, 0)] * (x.ndim - 1)))
        starts = jnp.arange(self.peers, dtype=jnp.int32) * self.most
        there = jnp.full(self.peers, self.index * self.most, jnp.int32)
        buffer = jnp.zeros((self.rows + more, *x.shape[1:]), x.dtype)
        sizes, arriving = sizes.astype(jnp.int32), arriving.astype(jnp.int32)
        return lax.ragged_all_to_all(
            x, buffer, starts, sizes, there, arriving, axis_name=AXIS, axis_index_groups=self.groups
        )


class Route(NamedTuple):
    """The copies of rows that ranks send each other. A copy is one of `copies` per row, which need not all be used.

    Attributes:
      sizes, arriving: per peer, number of copies that are sent to it, and that it sends here.
      rounds: how many rounds send all copies between all peers; at least one.
      copy_of_place: the copies in the order of their receivers; those that are not used come last.
      place_of_copy: the inverse.
      ids: of each copy, the experts that the receiver leads to, which count from 1 there; 0 for none.
    """

    sizes: Int[Array, " P"]
    arriving: Int[Array, " P"]
    rounds: Int[Array, ""]
    copy_of_place: Int[Array, " S"]
    place_of_copy: Int[Array, " S"]
    ids: Int[Array, "S K"]

    @classmethod
    def of(cls, hop: Hop, ids: Int[Array, "n K"]) -> Route:
        """Returns the route of rows to their experts, whose ids count from 1; peers tell each other their numbers."""
        receiver = _receivers(ids, hop.peers, hop.behind, hop.copies(ids.shape[1]))
        order = pallas_kernels.order_by_expert(receiver, hop.peers + 1)  # receivers in the place of experts
        inside = ids[:, None] - receiver[..., None] * hop.behind
        there = (ids[:, None] > 0) & (inside > 0) & (inside <= hop.behind)
        sizes = order.group_sizes[:-1]
        of_all = lax.all_gather(sizes, AXIS, axis_index_groups=hop.groups)
        return cls(
            sizes=sizes,
            arriving=of_all[:, hop.index],
            rounds=jnp.maximum(-(-jnp.max(of_all) // hop.most), 1),
            copy_of_place=order.slot_of_row,
            place_of_copy=order.row_of_slot,
            ids=jnp.where(there, inside, 0).reshape(-1, ids.shape[1]),
        )

    def in_round(self, hop: Hop, index: Int[Array, ""] | int) -> Round:
        """Returns the part of the copies that a round sends."""
        first = index * hop.most
        sizes, arriving = (jnp.clip(count - first, 0, hop.most) for count in (self.sizes, self.arriving))
        starts = jnp.cumsum(self.sizes) - self.sizes
        at, copies = jnp.arange(hop.most), self.copy_of_place.shape[0]
        place = jnp.minimum((starts + first)[:, None] + at, copies - 1)
        sent = jnp.where(at < sizes[:, None], self.copy_of_place[place], copies).reshape(-1)
        receiver = jnp.searchsorted(starts + self.sizes, self.place_of_copy, side="right")
        used = jnp.minimum(receiver, hop.peers - 1)
        behind_first = self.place_of_copy - starts[used] - first
        holds = (receiver < hop.peers) & (behind_first >= 0) & (behind_first < hop.most)
        return Round(sizes, arriving, sent, jnp.where(holds, used * hop.most + behind_first, hop.rows), holds)


class Round(NamedTuple):
    """A round of a hop.

    Attributes:
      sizes, arriving: per peer, number of rows that are sent to it, and that it sends here.
      copy: of each row to send, which copy it is; the number of copies where there is none.
      place: of each copy its row among those that are sent; one past them if it is not.
      holds: whether the copy is sent in this round.
    """

    sizes: Int[Array, " P"]
    arriving: Int[Array, " P"]
    copy: Int[Array, " M"]
    place: Int[Array, " S"]
    holds: Bool[Array, " S"]


Rows = Float[Array, "M d"] | Tiles
"""Rows as they are sent: an array, or FP8 tiles along the rows. A hop sends what arrived in FP8 on as it is."""

Arrived = tuple[Any, Float[Array, "M K"], Int[Array, "M K"]]
"""Rows, the gates of their experts, and the ids of these, which count from 1; 0 where there is none."""


def send(
    hop: Hop, rows: Rows, gates: Float[Array, "n K"], route: Route, index: Int[Array, ""] | int
) -> tuple[Rows, Float[Array, "M K"], Int[Array, "M K"]]:
    """Returns what arrives at this rank in a round, rows in FP8 as tiles; zeros where no row arrives.

    It is not differentiable.
    """
    this = route.in_round(hop, index)
    copies = this.copy // hop.copies(gates.shape[1])
    ids = taken(route.ids, this.copy)
    own_gates = jnp.where(ids > 0, taken(gates, copies), 0)
    wide = jnp.promote_types(gates.dtype, jnp.float32)
    beside = jnp.concatenate([ids.astype(wide), own_gates.astype(wide)], axis=1)
    arrived, beside = _send_in_format(hop, hop.tokens, rows, copies, this, beside)
    chosen = ids.shape[1]
    return arrived, beside[:, chosen:], beside[:, :chosen].astype(ids.dtype)


def dispatch(
    hop: Hop,
    rows: Float[Array, "n d"] | QuantizedRows,
    gates: Float[Array, "n K"],
    route: Route,
    index: Int[Array, ""] | int,
) -> tuple[Float[Array, "M d"] | QuantizedRows, Float[Array, "M K"], Int[Array, "M K"]]:
    """Returns what `send` does, differentiably: rows that arrive in FP8 have an array that gets their gradient."""
    arrived: Any = _dispatch(hop, *QuantizedRows.parts(rows), gates, route, index)
    return arrived


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dispatch(hop: Hop, rows: Array, tiles: Tiles | None, gates: Array, route: Route, index: Any) -> Any:
    arrived, own_gates, own_ids = send(hop, rows if tiles is None else tiles, gates, route, index)
    if not isinstance(arrived, jax.Array):
        arrived = QuantizedRows.of(arrived, rows.dtype)
    return arrived, own_gates, own_ids


def gradient_of_dispatch(
    hop: Hop,
    rows_bar: Float[Array, "M d"],
    gates_bar: Float[Array, "M K"],
    route: Route,
    index: Int[Array, ""] | int,
) -> tuple[Float[Array, "n d"], Float[Array, "n K"]]:
    """Returns the gradients by the rows and gates that were sent, from those by what arrived."""
    this = route.in_round(hop, index)
    returned = hop.exchange(gates_bar, this.arriving, this.sizes, more=_NEVER_SENT)
    of_copies = jnp.where(this.holds[:, None] & (route.ids > 0), returned[this.place], 0)
    of_rows = of_copies.reshape(-1, hop.copies(gates_bar.shape[1]), gates_bar.shape[1])
    return _returned(hop, rows_bar, route, this), jnp.sum(of_rows, axis=1)


def _dispatch_forward(hop: Hop, rows: Array, tiles: Any, gates: Array, route: Route, index: Any) -> tuple[Any, Any]:
    return _dispatch(hop, rows, tiles, gates, route, index), (route, index, jnp.empty(0, gates.dtype))


def _dispatch_backward(hop: Hop, residuals: Any, bars: Any) -> tuple[Array, None, Array, None, None]:
    (route, index, like), (bar, gates_bar, _) = residuals, bars
    rows_bar, gates_bar = gradient_of_dispatch(hop, QuantizedRows.parts(bar)[0], gates_bar, route, index)
    return rows_bar, None, gates_bar.astype(like.dtype), None, None


_dispatch.defvjp(_dispatch_forward, _dispatch_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def collect(hop: Hop, results: Float[Array, "M d"], route: Route, index: Int[Array, ""] | int) -> Float[Array, "n d"]:
    """Returns results to the senders of the rows, which add up those of each row's copies in float32."""
    return _returned(hop, results, route, route.in_round(hop, index))


def gradient_of_collect(hop: Hop, out_bar: Rows, route: Route, index: Int[Array, ""] | int) -> Rows:
    """Returns the gradient by the results, from that by their sums."""
    this = route.in_round(hop, index)
    copies = this.copy // hop.copies(route.ids.shape[1])
    return _send_in_format(hop, hop.gradients, out_bar, copies, this)[0]


def _collect_backward(hop: Hop, residuals: Any, out_bar: Array) -> tuple[Array, None, None]:
    return as_array(gradient_of_collect(hop, out_bar, *residuals), out_bar.dtype), None, None


collect.defvjp(lambda hop, results, *route: (collect(hop, results, *route), route), _collect_backward)


def _send_in_format(
    hop: Hop,
    wire: DispatchFormat | None,
    rows: Rows,
    row_of_copy: Int[Array, " M"],
    this: Round,
    beside: Float[Array, "M B"] | None = None,
) -> tuple[Rows, Any]:
    """Sends copies of rows in the format `wire`, and with them numbers in float32, the scales among them."""

    def exchanged(x: Array) -> Array:
        return hop.exchange(x, this.sizes, this.arriving)

    if wire is None:
        assert isinstance(rows, jax.Array)
        return exchanged(taken(rows, row_of_copy)), None if beside is None else exchanged(beside)
    copies = taken(wire.quantize(rows) if isinstance(rows, jax.Array) else rows, row_of_copy)
    width = copies.scales.shape[1]
    values = exchanged(copies.values)
    with_scales = exchanged(copies.scales if beside is None else jnp.concatenate([copies.scales, beside], axis=1))
    return dataclasses.replace(copies, values=values, scales=with_scales[:, :width]), with_scales[:, width:]


def _returned(hop: Hop, results: Float[Array, "M d"], route: Route, this: Round) -> Float[Array, "n d"]:
    """Returns results to their senders, and sums those of each row's copies."""
    back = hop.exchange(results, this.arriving, this.sizes, more=_NEVER_SENT)
    copies = hop.copies(route.ids.shape[1])
    own = this.holds.reshape(-1, copies).astype(jnp.promote_types(results.dtype, jnp.float32))
    order = pallas_kernels.Permutation(this.place, jnp.pad(this.copy, (0, _NEVER_SENT)), route.sizes)
    return pallas_kernels.combine(back, own, order)


def taken[T](x: T, index: Int[Array, " M"]) -> T:
    """Returns rows of an array, or of all arrays of a tree, and zeros where the index is past their end."""
    return jax.tree.map(lambda part: part.at[index].get(mode="fill", fill_value=0), x)


def as_array(rows: Rows, dtype: jnp.dtype) -> Float[Array, "M d"]:
    """Returns the numbers of rows that may be in FP8."""
    return rows if isinstance(rows, jax.Array) else dequantize(rows).astype(dtype)


def _receivers(ids: Int[Array, "n K"], peers: int, behind: int, copies: int) -> Int[Array, "n R"]:
    """Returns the distinct peers that lead to any of a row's experts, in order, padded with `peers`."""
    of_slot = jnp.sort(jnp.where(ids > 0, (ids - 1) // behind, peers), axis=1)
    again = jnp.pad(of_slot[:, 1:] == of_slot[:, :-1], ((0, 0), (1, 0)))
    return jnp.sort(jnp.where(again, peers, of_slot), axis=1)[:, :copies]
