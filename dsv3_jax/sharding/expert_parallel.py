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
from jaxtyping import Array, Bool, Float

import pallas_kernels
from dsv3_jax.model import DeepSeekV3
from dsv3_jax.modules.moe import MixtureOfExperts
from dsv3_jax.precision.dispatch import travel_formats
from dsv3_jax.precision.fp8_recipe import Fp8Recipe
from dsv3_jax.sharding.expert_hops import Hop
from dsv3_jax.sharding.expert_layout import hops_between
from dsv3_jax.sharding.expert_rows import Product, over_hops
from dsv3_jax.sharding.ranks import SumOnRanks, on_every_rank
from dsv3_jax.sharding.rules import BATCH_AXES

_ROOM = 2  # rows of a piece's buffers, over those of all tokens under an even load

_GATE_UP = PartitionSpec("expert", None, "tensor", "fsdp")
_DOWN = PartitionSpec("expert", "fsdp", "tensor")


def distribute_experts(model: DeepSeekV3, mesh: Mesh, *, overlap: bool = False) -> None:
    """Makes every MoE layer of the model exchange its tokens over the mesh's expert axis.

    Args:
      overlap: see `ExpertExchange`.
    """
    blocks = [model.moe_blocks] if model.config.num_moe_layers else []
    for block in [*blocks, *(module.block for module in model.mtp)]:
        if isinstance(block.feed_forward, MixtureOfExperts):
            distribute_layer(block.feed_forward, mesh, overlap=overlap)


def distribute_layer(layer: MixtureOfExperts, mesh: Mesh, *, overlap: bool = False) -> None:
    """The same for one layer."""
    config = layer.router.config
    layer.router.gate = GateOnRanks(mesh)
    layer.over_ranks = SumOnRanks()
    layer.experts.exchange = ExpertExchange(
        mesh,
        groups=config.n_group,
        reached_groups=config.topk_group,
        recipe=layer.experts.precision.fp8,
        overlap=overlap,
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
    """What a layer's experts hand their tokens to.

    A token travels once to every rank that has some of its experts. Where the groups of node-limited routing are each
    spread over several ranks it first travels once to every group it reaches, to the rank that has the sender's place
    there, and from that one to the ranks of its experts; what these return is summed on the way back.

    Attributes:
      mesh: the devices.
      groups, reached_groups: of experts, and how many of them a token reaches at most: n_group and topk_group.
      recipe: of FP8, whose field `dispatch` says whether tokens and gradients travel in it.
      overlap: a rank's tokens go in two halves that do not wait for each other, so that one half can travel while the
        other is multiplied.
    """

    mesh: Mesh
    groups: int = 1
    reached_groups: int | None = None
    recipe: Fp8Recipe | None = None
    overlap: bool = False

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

    @property
    def for_any_placement(self) -> ExpertExchange:
        """The same for experts that do not lie in the order of the router's groups."""
        return dataclasses.replace(self, reached_groups=None)

    @property
    def hops(self) -> tuple[Hop, ...]:
        """Over which ranks a token travels, one after the other."""
        tokens, gradients = travel_formats(self.recipe)
        return tuple(
            Hop(**vars(hop), ragged=self._ragged, tokens=tokens, gradients=gradients)
            for hop in hops_between(self.mesh.shape["expert"], self.groups, self.reached_groups)
        )

    @property
    def _ragged(self) -> bool:
        """Whether the backend sends as many rows to each rank as there are, instead of equally many to all."""
        return self.mesh.devices.flat[0].platform != "cpu"

    def _on_a_rank(
        self, product: Product, u: Array, expert_index: Array, gate: Array, gate_up: Array, down: Array
    ) -> Float[Array, "n d"]:
        """Its own tokens, in pieces; weights are gathered once for all of them."""
        gate_up = lax.all_gather(gate_up, "fsdp", axis=3, tiled=True)
        down = lax.all_gather(down, "fsdp", axis=1, tiled=True)
        halves = 2 if self.overlap and u.shape[0] % 2 == 0 else 1
        pieces = self._pieces(u.shape[0] // halves, expert_index.shape[1], gate_up.shape[0])

        def one(u: Array, expert_index: Array, gate: Array, gate_up: Array, down: Array) -> Array:
            experts = functools.partial(product, gate_up=gate_up, down=down)
            out = over_hops(self.hops, u, expert_index + 1, gate, gate_up.shape[0], experts)
            return lax.psum(out, "tensor") if self.mesh.shape["tensor"] > 1 else out

        def a_piece(parts: tuple[Array, ...]) -> Array:
            """Its halves one below the other, with nothing between them for one to wait for."""
            out: list[Any] = [
                _keeping_arguments(one, *(part[half] for part in parts), gate_up, down) for half in range(halves)
            ]
            return jnp.stack(out)

        parts = tuple(x.reshape(pieces, halves, -1, *x.shape[1:]) for x in (u, expert_index, gate))
        if pieces == 1:
            return a_piece(tuple(part[0] for part in parts)).reshape(u.shape)
        return lax.map(a_piece, parts).reshape(u.shape)

    def _pieces(self, tokens: int, chosen: int, experts: int) -> int:
        """How many, so that the worst case of one takes no more than `_ROOM` times the even load of all."""
        worst = self.mesh.shape["expert"] * min(chosen, experts)
        wanted = -(-worst // (_ROOM * chosen))
        return next(pieces for pieces in range(min(wanted, tokens), tokens + 1) if tokens % pieces == 0)


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
