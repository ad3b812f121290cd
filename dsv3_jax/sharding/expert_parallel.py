"""Expert parallelism: tokens are dispatched to the ranks that hold their experts, and combined (report section 3.2.2).

Every rank of the batch axes and of the context axis has tokens of its own, and every rank of the expert axis some of
the experts. No token is ever dropped: receive buffers are large enough for the worst case, in which all tokens of all
ranks choose the experts of one rank. So that such buffers stay small, tokens are sent in pieces, and the backward pass
recomputes each piece.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

import pallas_kernels
from dsv3_jax.modules.devices import ExpertProduct, ExpertShapes
from dsv3_jax.modules.parameter import ParameterShape
from dsv3_jax.precision.dispatch import dispatch_formats
from dsv3_jax.precision.fp8_weight import Fp8Weight
from dsv3_jax.sharding.expert_hops import Hop
from dsv3_jax.sharding.expert_layout import hops_between, pieces_of
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
        product: ExpertProduct,
    ) -> Float[Array, "*batch d"]:
        """Returns sum_i g_i E_i(u) of every token; `gates` has leading axes that flatten to the tokens of `u`."""
        leading = gates.gate.shape[:-1]
        gate_up_axes, down_axes = (weight_axes(shape, self.mesh) for shape in (self.shapes.gate_up, self.shapes.down))
        batch = PartitionSpec(*token_axes(self.mesh, leading))
        exchange = on_every_rank(
            self.mesh,
            functools.partial(self._on_a_rank, product),
            in_specs=(batch, batch, batch, PartitionSpec(*gate_up_axes), PartitionSpec(*down_axes)),
            out_specs=batch,
        )
        by_sequence = u.reshape(*leading, u.shape[-1])
        return exchange(by_sequence, gates.expert_index, gates.gate, gate_up, down).reshape(u.shape)

    @property
    def hops(self) -> tuple[Hop, ...]:
        """The exchanges between ranks that a token goes through, in their order."""
        tokens, gradients = dispatch_formats(self.shapes.fp8)
        return tuple(
            Hop(**vars(hop), ragged=self._ragged, tokens=tokens, gradients=gradients)
            for hop in hops_between(self.mesh.shape["expert"], self.shapes.groups, self.shapes.reached_groups)
        )

    @property
    def _ragged(self) -> bool:
        """Whether the backend can send each rank as many rows as there are, instead of equally many to all."""
        return self.mesh.devices.flat[0].platform != "cpu"

    def _on_a_rank(
        self, product: ExpertProduct, u: Array, expert_index: Array, gate: Array, gate_up: Any, down: Any
    ) -> Float[Array, "*batch d"]:
        """Applies the experts to this rank's tokens, in pieces; weights are all-gathered once for all of them."""
        batch = u.shape
        u, expert_index, gate = (x.reshape(-1, x.shape[-1]) for x in (u, expert_index, gate))
        gate_up, down = self._gathered(gate_up, self.shapes.gate_up), self._gathered(down, self.shapes.down)
        width_is_sharded = "tensor" in weight_axes(self.shapes.down, self.mesh)
        pieces = self._pieces(u.shape[0], expert_index.shape[1], gate_up.shape[0])

        def added(out: Array) -> Array:
            return lax.psum(out, "tensor") if width_is_sharded else out

        parts = tuple(x.reshape(pieces, -1, *x.shape[1:]) for x in (u, expert_index + 1, gate))
        if self.overlap and pieces > len(self.hops) > 0:
            stages = TokenStages(self.hops, gate_up.shape[0], product, added, parts[1].shape[1:])
            out: Any = in_stages(stages, parts, (gate_up, down))
            return out.reshape(batch)

        def one(u: Array, ids: Array, gate: Array, gate_up: Any, down: Any) -> Array:
            return added(over_hops(self.hops, u, ids, gate, (gate_up, down), product))

        def a_piece(part: tuple[Array, ...]) -> Array:
            return recomputed(one, *part, gate_up, down)  # pyright: ignore[reportReturnType]

        if pieces == 1:
            return a_piece(tuple(part[0] for part in parts)).reshape(batch)
        return lax.map(a_piece, parts).reshape(batch)

    def _gathered(self, weight: Float[Array, "E ..."], shape: ParameterShape) -> Array | Fp8Weight:
        """Returns the weight with its FSDP shards all-gathered."""
        axes = weight_axes(shape, self.mesh)
        dimension = gathered_dimension(shape, axes)
        if dimension is None:
            return weight
        dtype = self.shapes.gather_dtype or weight.dtype
        return gather_over_fsdp(weight, dimension, dtype, in_axes=1, stacked=1, ranks=axes[dimension])

    def _pieces(self, tokens: int, chosen: int, experts: int) -> int:
        """Returns the number of pieces; where the exchange is overlapped, at least one more than there are hops."""
        fewest = 1 + len(self.hops) if self.overlap else 1
        return pieces_of(tokens, self.mesh.shape["expert"], chosen, experts, fewest=fewest)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def recomputed(function: Callable[..., Array], *arguments: Array) -> Array:
    """Returns `function(*arguments)`, which the backward pass recomputes.

    This is not `jax.checkpoint`, because the policy of a rematerialised layer around it would keep the named values
    inside, whose buffers are as large as the worst case.
    """
    return function(*arguments)


def _keep_arguments(function: Callable[..., Array], *arguments: Array) -> tuple[Array, tuple[Array, ...]]:
    return function(*arguments), arguments


def _recompute(function: Callable[..., Array], arguments: tuple[Array, ...], out_bar: Array) -> tuple[Any, ...]:
    return jax.vjp(function, *arguments)[1](out_bar)


recomputed.defvjp(_keep_arguments, _recompute)
