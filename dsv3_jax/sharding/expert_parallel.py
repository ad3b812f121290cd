"""Expert parallelism: tokens travel to the ranks that hold their experts, and back (report section 3.2.2).

Every rank of the batch axes has tokens of its own, and every rank of the expert axis some of the experts. No token is
ever lost: buffers have room for the worst case, all tokens of all ranks choosing one rank's experts, and so that such
buffers stay small the tokens go in pieces, each of which is computed anew in the backward pass.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

import pallas_kernels
from dsv3_jax.model import DeepSeekV3
from dsv3_jax.modules.moe import MixtureOfExperts
from dsv3_jax.sharding.rules import BATCH_AXES

_ROOM = 2  # rows of a piece's buffers, over those of all tokens under an even load

_GATE_UP = PartitionSpec("expert", None, "tensor", "fsdp")
_DOWN = PartitionSpec("expert", "fsdp", "tensor")

Product = Callable[[Array, Array, Array, Array, int], Array]
"""(rows sorted by expert, gate_up, down, group sizes, row alignment) -> rows."""


def distribute_experts(model: DeepSeekV3, mesh: Mesh) -> None:
    """Makes every MoE layer of the model exchange its tokens over the mesh's expert axis."""
    blocks = [model.moe_blocks] if model.config.num_moe_layers else []
    for block in [*blocks, *(module.block for module in model.mtp)]:
        if isinstance(block.feed_forward, MixtureOfExperts):
            block.feed_forward.router.gate = GateOnRanks(mesh)
            block.feed_forward.experts.exchange = ExpertExchange(mesh)


def on_every_rank(mesh: Mesh, function: Callable[..., Any], *, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`jax.shard_map` over every axis of the mesh that no `shard_map` around it has taken already.

    A pipeline takes the stage axis; what is inside it is then for the devices of one stage.
    """
    around = jax.sharding.get_abstract_mesh()
    taken = set(around.manual_axes)
    return jax.shard_map(
        function,
        mesh=around if taken else mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=set(mesh.axis_names) - taken,
        check_vma=False,
    )


@dataclasses.dataclass(frozen=True)
class GateOnRanks:
    """`pallas_kernels.gate` for every rank's own sequences; loads are summed over all."""

    mesh: Mesh

    def __call__(
        self,
        logits: Float[Array, "B T E"],
        bias: Float[Array, " E"] | None,
        *,
        token_mask: Bool[Array, "B T"] | None = None,
        **settings: Any,
    ) -> pallas_kernels.Gates:
        batch, whole = PartitionSpec(BATCH_AXES), PartitionSpec()

        def on_a_rank(logits: Array, bias: Array | None, token_mask: Array | None) -> pallas_kernels.Gates:
            gates = pallas_kernels.gate(logits, bias, token_mask=token_mask, **settings)
            return dataclasses.replace(gates, load=lax.psum(gates.load, BATCH_AXES))

        return on_every_rank(
            self.mesh,
            on_a_rank,
            in_specs=(batch, whole, batch),
            out_specs=pallas_kernels.Gates(
                expert_index=batch,  # pyright: ignore[reportArgumentType]
                gate=batch,  # pyright: ignore[reportArgumentType]
                load=whole,  # pyright: ignore[reportArgumentType]
                affinity_mean=batch,  # pyright: ignore[reportArgumentType]
                selection_fraction=batch,  # pyright: ignore[reportArgumentType]
            ),
        )(logits, bias, token_mask)


@dataclasses.dataclass(frozen=True)
class ExpertExchange:
    """What a layer's experts hand their tokens to."""

    mesh: Mesh

    def __call__(
        self,
        u: Float[Array, "N d"],
        gates: pallas_kernels.Gates,
        gate_up: Float[Array, "E 2 I d"],
        down: Float[Array, "E d I"],
        product: Product,
    ) -> Float[Array, "N d"]:
        """sum_i g_i E_i(u) for every token; tokens lie on the batch axes, experts on the expert axis."""
        chosen = gates.expert_index.shape[-1]
        batch = PartitionSpec(BATCH_AXES)
        exchange = on_every_rank(
            self.mesh,
            functools.partial(self._on_a_rank, product),
            in_specs=(batch, batch, batch, _GATE_UP, _DOWN),
            out_specs=batch,
        )
        return exchange(u, gates.expert_index.reshape(-1, chosen), gates.gate.reshape(-1, chosen), gate_up, down)

    def _on_a_rank(
        self, product: Product, u: Array, expert_index: Array, gate: Array, gate_up: Array, down: Array
    ) -> Float[Array, "n d"]:
        """Its own tokens, in pieces; weights are gathered once for all of them."""
        gate_up = lax.all_gather(gate_up, "fsdp", axis=3, tiled=True)
        down = lax.all_gather(down, "fsdp", axis=1, tiled=True)
        pieces = self._pieces(u.shape[0], expert_index.shape[1], gate_up.shape[0])

        def one(u: Array, expert_index: Array, gate: Array, gate_up: Array, down: Array) -> Array:
            out = self._piece(u, expert_index, gate, gate_up, down, product)
            return lax.psum(out, "tensor") if self.mesh.shape["tensor"] > 1 else out

        if pieces == 1:
            return _keeping_arguments(one, u, expert_index, gate, gate_up, down)
        parts = (x.reshape(pieces, -1, *x.shape[1:]) for x in (u, expert_index, gate))
        out = lax.map(lambda part: _keeping_arguments(one, *part, gate_up, down), tuple(parts))
        return out.reshape(u.shape)

    def _pieces(self, tokens: int, chosen: int, experts: int) -> int:
        """How many, so that the worst case of one takes no more than `_ROOM` times the even load of all."""
        worst = self.mesh.shape["expert"] * min(chosen, experts)
        wanted = -(-worst // (_ROOM * chosen))
        return next(pieces for pieces in range(min(wanted, tokens), tokens + 1) if tokens % pieces == 0)

    def _piece(
        self, u: Array, expert_index: Array, gate: Array, gate_up: Array, down: Array, product: Product
    ) -> Float[Array, "n d"]:
        ranks, experts = self.mesh.shape["expert"], gate_up.shape[0]
        rows, permutation = pallas_kernels.permute(u, expert_index, ranks * experts, row_alignment=1)
        slots = u.shape[0] * min(expert_index.shape[1], experts)
        route = _Route.of(permutation.group_sizes, ranks, slots, self._ragged)
        arrived = route.send(rows, self._ragged)

        alignment = pallas_kernels.preferred_row_alignment(expert_index.size, experts)
        order = _ExpertOrder.of(route, alignment)
        sorted_rows = jnp.where(order.filled[:, None], arrived[order.source], 0)
        out = product(sorted_rows, gate_up, down, order.group_sizes, alignment)
        leaving = jnp.where(route.arrived[:, None], out[order.place], 0)
        return pallas_kernels.combine(route.send_back(leaving, rows.shape[0], self._ragged), gate, permutation)

    @property
    def _ragged(self) -> bool:
        """Whether the backend sends as many rows to each rank as there are, instead of equally many to all."""
        return self.mesh.devices.flat[0].platform != "cpu"


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _keeping_arguments(function: Callable[..., Array], *arguments: Array) -> Array:
    """`function(*arguments)`, computed anew in the backward pass.

    Not `jax.checkpoint`: the policy of a rematerialised layer around it would keep what bears a name inside, which
    here has room for the worst case.
    """
    return function(*arguments)


def _keep_arguments(function: Callable[..., Array], *arguments: Array) -> tuple[Array, tuple[Array, ...]]:
    return function(*arguments), arguments


def _compute_anew(function: Callable[..., Array], arguments: tuple[Array, ...], out_bar: Array) -> tuple[Any, ...]:
    return jax.vjp(function, *arguments)[1](out_bar)


_keeping_arguments.defvjp(_keep_arguments, _compute_anew)


@dataclasses.dataclass(frozen=True)
class _Route:
    """Where a piece's rows go. Sizes are [sender, receiver]; the receive buffer has a place for the worst case.

    Attributes:
      rank: this one.   slots: most rows from one rank to another.
      sizes: rows from every rank to every other.
      segment_sizes, segment_starts: [sender, expert of this rank] in the receive buffer.
      arrived: which rows of the receive buffer are filled.
      segment: sender times experts plus expert of every row of the receive buffer.
    """

    rank: Int[Array, ""]
    slots: int
    sizes: Int[Array, "R R"]
    segment_sizes: Int[Array, "R E"]
    segment_starts: Int[Array, "R E"]
    arrived: Bool[Array, " M"]
    segment: Int[Array, " M"]

    @classmethod
    def of(cls, group_sizes: Int[Array, " RE"], ranks: int, slots: int, ragged: bool) -> _Route:
        rank = lax.axis_index("expert")
        counts = lax.all_gather(group_sizes, "expert").reshape(ranks, ranks, -1)
        segment_sizes = counts[:, rank]
        flat = segment_sizes.reshape(-1)
        if ragged:
            starts = (jnp.cumsum(flat) - flat).reshape(segment_sizes.shape)
        else:
            starts = jnp.cumsum(segment_sizes, axis=1) - segment_sizes + slots * jnp.arange(ranks)[:, None]
        at = jnp.arange(ranks * slots)
        # Empty segments share their start with the next, which is the one that rows there belong to.
        segment = jnp.searchsorted(starts.reshape(-1), at, side="right") - 1
        arrived = at < starts.reshape(-1)[segment] + flat[segment]
        return cls(rank, slots, jnp.sum(counts, axis=2), segment_sizes, starts, arrived, segment)

    def send(self, rows: Float[Array, "S d"], ragged: bool) -> Float[Array, "M d"]:
        """Rows sorted by receiver, to the receivers."""
        mine, ranks = self.sizes[self.rank], self.sizes.shape[0]
        starts = jnp.cumsum(mine) - mine
        if not ragged:
            at = jnp.arange(self.slots)
            source = jnp.minimum(starts[:, None] + at, rows.shape[0] - 1)
            padded = jnp.where((at < mine[:, None])[..., None], rows[source], 0)
            return lax.all_to_all(padded, "expert", 0, 0, tiled=True).reshape(ranks * self.slots, -1)
        buffer = jnp.zeros((ranks * self.slots, rows.shape[1]), rows.dtype)
        there = (jnp.cumsum(self.sizes, axis=0) - self.sizes)[self.rank]
        return _ragged_all_to_all(rows, buffer, starts, mine, there, self.sizes[:, self.rank])

    def send_back(self, rows: Float[Array, "M d"], count: int, ragged: bool) -> Float[Array, "S d"]:
        """Rows in the order they arrived, to where they came from: `count` rows in the order they were sent."""
        mine, ranks = self.sizes[self.rank], self.sizes.shape[0]
        starts = jnp.cumsum(mine) - mine
        if not ragged:
            padded = lax.all_to_all(rows.reshape(ranks, self.slots, -1), "expert", 0, 0, tiled=True)
            at = jnp.arange(count)
            receiver = jnp.searchsorted(starts, at, side="right") - 1
            receiver = jnp.clip(receiver, 0, ranks - 1)
            return padded[receiver, jnp.minimum(at - starts[receiver], self.slots - 1)]
        theirs = self.sizes[:, self.rank]
        there = (jnp.cumsum(self.sizes, axis=1) - self.sizes)[:, self.rank]
        buffer = jnp.zeros((count, rows.shape[1]), rows.dtype)
        return _ragged_all_to_all(rows, buffer, jnp.cumsum(theirs) - theirs, theirs, there, mine)


@dataclasses.dataclass(frozen=True)
class _ExpertOrder:
    """Rows of the receive buffer sorted by expert, each expert's padded to the alignment.

    Attributes:
      group_sizes: rows of every expert, padding included.
      source: row of the receive buffer for every sorted place; filled: whether there is one.
      place: sorted place of every row of the receive buffer.
    """

    group_sizes: Int[Array, " E"]
    source: Int[Array, " P"]
    filled: Bool[Array, " P"]
    place: Int[Array, " M"]

    @classmethod
    def of(cls, route: _Route, alignment: int) -> _ExpertOrder:
        sizes, starts = route.segment_sizes, route.segment_starts
        ranks, experts = sizes.shape
        rows = route.arrived.shape[0]
        group_sizes = -(-jnp.sum(sizes, axis=0) // alignment) * alignment
        ends = jnp.cumsum(group_sizes)
        before = jnp.cumsum(sizes, axis=0) - sizes  # rows of the same expert from earlier senders

        at = jnp.arange(-(-(rows + experts * (alignment - 1)) // alignment) * alignment)
        expert = jnp.minimum(jnp.searchsorted(ends, at, side="right"), experts - 1)
        within = at - (ends - group_sizes)[expert]
        sender = jnp.sum((before + sizes)[:, expert] <= within, axis=0)
        filled = (sender < ranks) & (at < ends[-1])
        sender = jnp.minimum(sender, ranks - 1)
        source = jnp.where(filled, starts[sender, expert] + within - before[sender, expert], 0)

        own_sender, own_expert = route.segment // experts, route.segment % experts
        start = (ends - group_sizes)[own_expert] + before[own_sender, own_expert]
        place = jnp.where(route.arrived, start + jnp.arange(rows) - starts[own_sender, own_expert], 0)
        return cls(group_sizes, source, filled, place)


def _ragged_all_to_all(rows: Array, buffer: Array, starts: Array, sizes: Array, there: Array, arriving: Array) -> Any:
    offsets = [x.astype(jnp.int32) for x in (starts, sizes, there, arriving)]
    return lax.ragged_all_to_all(rows, buffer, *offsets, axis_name="expert")
