"""Expert parallelism: tokens are dispatched to the ranks that hold their experts, and combined (report section 3.2.2).

Every rank of the batch axes and of the context axis has tokens of its own, and every rank of the expert axis some of
the experts. No token is ever dropped: receive buffers are a little larger than an even load needs, and what they cannot
hold is sent in further rounds. Nothing that was received is kept: the backward pass exchanges tokens again.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

import pallas_kernels
from dsv3_jax.modules.devices import ExpertShapes
from dsv3_jax.modules.parameter import ParameterShape
from dsv3_jax.precision.dispatch import dispatch_formats
from dsv3_jax.precision.expert_networks import ExpertNetworks
from dsv3_jax.precision.fp8_weight import Fp8Weight
from dsv3_jax.sharding.expert_hops import Hop
from dsv3_jax.sharding.expert_layout import HopRanks, hops_between, pieces_of, rows_per_sender
from dsv3_jax.sharding.expert_products import ExpertsOfRank
from dsv3_jax.sharding.expert_rows import over_hops
from dsv3_jax.sharding.expert_stages import TokenStages, in_stages
from dsv3_jax.sharding.fsdp_gather import gather_over_fsdp
from dsv3_jax.sharding.ranks import on_every_rank
from dsv3_jax.sharding.rules import gathered_dimension, token_axes, weight_axes


@dataclasses.dataclass(frozen=True)
class ExpertExchange:
    """Applies the experts of a layer to tokens of all ranks.

    One copy of a token is sent to every rank that holds some of its experts. Where each group of node-limited routing
    is spread over several ranks there are two hops: one copy of the token is sent to each group it reaches, to the rank
    with the sender's position in that group, and from there to the ranks of its experts. Each rank adds up its experts'
    weighted outputs and returns one row, which is summed again on the way back.

    Attributes:
      mesh: the devices.
      shapes: weights, groups and FP8 recipe of the experts.
      overlap: whether a piece of a rank's tokens is sent while the one before is multiplied.
    """

    mesh: Mesh
    shapes: ExpertShapes
    overlap: bool = False

    def __call__(
        self,
        u: Float[Array, "*batch d"],
        gates: pallas_kernels.Gates,
        gate_up: Float[Array, "E 2 I d"] | Fp8Weight,
        down: Float[Array, "E d I"] | Fp8Weight,
        networks: ExpertNetworks,
    ) -> Float[Array, "*batch d"]:
        """Returns sum_i g_i E_i(u) of every token; `gates` has leading axes that flatten to the tokens of `u`."""
        leading = gates.gate.shape[:-1]
        gate_up_axes, down_axes = (weight_axes(shape, self.mesh) for shape in (self.shapes.gate_up, self.shapes.down))
        batch = PartitionSpec(*token_axes(self.mesh, leading))
        exchange = on_every_rank(
            self.mesh,
            functools.partial(self._on_a_rank, networks),
            in_specs=(batch, batch, batch, PartitionSpec(*gate_up_axes), PartitionSpec(*down_axes)),
            out_specs=batch,
        )
        by_sequence = u.reshape(*leading, u.shape[-1])
        return exchange(by_sequence, gates.expert_index, gates.gate, gate_up, down).reshape(u.shape)

    def _hops(self, tokens: int, chosen: int, experts: int) -> tuple[Hop, ...]:
        """Returns the exchanges between ranks that a piece of a rank's tokens goes through, in their order.

        Args:
          tokens: number of tokens of the piece.
          chosen, experts: number of experts of a token, and of a rank.
        """
        formats = dict(zip(("tokens", "gradients"), dispatch_formats(self.shapes.fp8), strict=True))
        hops, most = self._ranks_of_hops, rows_per_sender(self._ranks_of_hops, tokens, chosen)
        behind = [math.prod((experts, *(hop.peers for hop in hops[index + 1 :]))) for index in range(len(hops))]
        return tuple(
            Hop(**vars(hop), most=rows, behind=leads_to, ragged=self._ragged, **formats)
            for hop, rows, leads_to in zip(hops, most, behind, strict=True)
        )

    @property
    def _ranks_of_hops(self) -> tuple[HopRanks, ...]:
        return hops_between(self.mesh.shape["expert"], self.shapes.groups, self.shapes.reached_groups)

    @property
    def _ragged(self) -> bool:
        """Whether the backend can send each rank as many rows as there are, instead of equally many to all."""
        return self.mesh.devices.flat[0].platform != "cpu"

    def _on_a_rank(
        self, networks: ExpertNetworks, u: Array, expert_index: Array, gate: Array, gate_up: Any, down: Any
    ) -> Float[Array, "*batch d"]:
        """Applies the experts to this rank's tokens; weights are all-gathered once for all pieces of them."""
        batch = u.shape
        u, expert_index, gate = (x.reshape(-1, x.shape[-1]) for x in (u, expert_index, gate))
        gate_up, down = self._gathered(gate_up, self.shapes.gate_up), self._gathered(down, self.shapes.down)
        width_is_sharded = "tensor" in weight_axes(self.shapes.down, self.mesh)
        pieces, chosen = self._pieces(u.shape[0]), expert_index.shape[1]
        hops = self._hops(u.shape[0] // pieces, chosen, gate_up.shape[0])
        experts = ExpertsOfRank(networks, gate_up.shape[0], even_load=u.shape[0] // pieces * chosen)

        def added(out: Array) -> Array:
            return lax.psum(out, "tensor") if width_is_sharded else out

        if pieces > 1:
            parts: Any = tuple(x.reshape(pieces, -1, *x.shape[1:]) for x in (u, expert_index + 1, gate))
            out: Any = in_stages(TokenStages(hops, experts, added), parts, (gate_up, down))
            return out.reshape(batch)

        def exchanged(u: Array, ids: Array, gate: Array, *weights: Any) -> Array:
            return added(over_hops(hops, experts, u, ids, gate, weights))  # pyright: ignore[reportArgumentType]

        out: Any = recomputed(exchanged, u, expert_index + 1, gate, gate_up, down)
        return out.reshape(batch)

    def _gathered(self, weight: Float[Array, "E ..."], shape: ParameterShape) -> Array | Fp8Weight:
        """Returns the weight with its FSDP shards all-gathered."""
        axes = weight_axes(shape, self.mesh)
        dimension = gathered_dimension(shape, axes)
        if dimension is None:
            return weight
        dtype = self.shapes.gather_dtype or weight.dtype
        return gather_over_fsdp(weight, dimension, dtype, in_axes=1, stacked=1, ranks=axes[dimension])

    def _pieces(self, tokens: int) -> int:
        """Returns the number of pieces of a rank's tokens: one, unless pieces are exchanged beside products."""
        hops = len(self._ranks_of_hops)
        pieces = pieces_of(tokens, hops) if self.overlap and hops else 1
        return pieces if pieces > hops else 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def recomputed(function: Callable[..., Array], *arguments: Array) -> Array:
    """Returns `function(*arguments)`, which the backward pass recomputes.

    This is not `jax.checkpoint`, because the policy of a rematerialised layer around it would keep the named values
    inside, which are as large as the receive buffers.
    """
    return function(*arguments)


def _keep_arguments(function: Callable[..., Array], *arguments: Array) -> tuple[Array, tuple[Array, ...]]:
    return function(*arguments), arguments


def _recompute(function: Callable[..., Array], arguments: tuple[Array, ...], out_bar: Array) -> tuple[Any, ...]:
    return jax.vjp(function, *arguments)[1](out_bar)


recomputed.defvjp(_keep_arguments, _recompute)
