"""A loaded model whose experts are arranged by a placement: physical experts, some of them copies (section 3.4)."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

import pallas_kernels
from dsv3_jax.errors import ConfigError
from dsv3_jax.model import DeepSeekV3
from dsv3_jax.modules.moe import Experts, MixtureOfExperts
from dsv3_jax.modules.parameter import ParameterShape
from dsv3_jax.sharding.placement import Placement


class ExpertCopies(nnx.Variable):
    """Tables that say which physical experts are copies of each logical expert, and how many there are."""


class PlacedExperts(nnx.Module):
    """Physical experts behind a router that chooses logical ones; a token's index in the batch chooses the copy.

    Arrays of stacked layers have a leading layer axis, as the model's own.

    Args:
      experts: the model's own experts, one per logical expert.
      logical: int32, the logical expert of each physical expert.
      copies, counts: int32, the physical experts of each logical one, and how many of these are used.
    """

    def __init__(self, experts: Experts, logical: Int[Array, "*L P"], copies: Array, counts: Array):
        self.physical = _rearranged(experts, logical)
        self.copies = ExpertCopies(copies)
        self.counts = ExpertCopies(counts)

    def __call__(self, u: Float[Array, "*batch d"], gates: pallas_kernels.Gates) -> Float[Array, "*batch d"]:
        """Returns sum_i g_i FFN_i(u) of every token."""
        return self.physical(u, _to_physical(gates, self.copies[...], self.counts[...]))

    def of_few(
        self,
        u: Float[Array, "N d"],
        gates: pallas_kernels.Gates,
        token_mask: Bool[Array, " N"],
        layer: Int[Array, ""] | None,
    ) -> Float[Array, "N d"]:
        """Returns the same while decoding, where the arrays may hold all layers."""
        copies, counts = self.copies[...], self.counts[...]
        if layer is not None:
            copies, counts = copies[layer], counts[layer]
        return self.physical.of_few(u, _to_physical(gates, copies, counts), token_mask, layer)


def with_placed_experts(model: DeepSeekV3, placement: Placement) -> DeepSeekV3:
    """Returns a copy of the model, for inference, with the placement's physical experts; its outputs are the model's.

    Args:
      placement: one row per MoE layer, then one per MTP block.

    Raises:
      ConfigError: the placement is for other layers or experts.
    """
    config = model.config
    wanted = (config.num_moe_layers + config.num_nextn_predict_layers, config.n_routed_experts)
    if placement.counts.shape != wanted:
        raise ConfigError(
            f"the placement is of {placement.counts.shape[0]} layers with {placement.counts.shape[1]} experts, "
            f"the model has {wanted[0]} with {wanted[1]}"
        )
    placed = nnx.clone(model)
    tables = [jnp.asarray(table, jnp.int32) for table in (placement.logical, placement.copies, placement.counts)]
    main = config.num_moe_layers
    if main:
        _place(placed.moe_blocks.feed_forward, [table[:main] for table in tables])
    for depth, module in enumerate(placed.mtp):
        _place(module.block.feed_forward, [table[main + depth] for table in tables])
    return placed


def _place(layer: nnx.Module, tables: list[Array]) -> None:
    assert isinstance(layer, MixtureOfExperts)
    assert isinstance(layer.experts, Experts)
    layer.experts = PlacedExperts(layer.experts, *tables)


def _rearranged(experts: Experts, logical: Int[Array, "*L P"]) -> Experts:
    """Returns the physical experts.

    A placement need not keep the router's groups together: a token may reach more groups than the router says.
    """

    def shape_of(own: ParameterShape) -> ParameterShape:
        return dataclasses.replace(own, shape=(logical.shape[-1], *own.shape[1:]))

    own = experts.shapes
    shapes = dataclasses.replace(own, gate_up=shape_of(own.gate_up), down=shape_of(own.down), reached_groups=None)
    gate_up, down = (nnx.Param(_gather(weight[...], logical)) for weight in (experts.gate_up, experts.down))
    return Experts(gate_up, down, shapes, precision=experts.precision, devices=experts.devices)


def _gather(weights: Array, logical: Int[Array, "*L P"]) -> Array:
    """Returns the weights of each physical expert; stacked layers are gathered each by its own row."""
    if logical.ndim == 1:
        return weights[logical]
    return weights[jnp.arange(len(logical))[:, None], logical]


def _to_physical(
    gates: pallas_kernels.Gates, copies: Int[Array, "E R"], counts: Int[Array, " E"]
) -> pallas_kernels.Gates:
    """Replaces logical experts by copies of theirs, which take turns by the token's index in the batch."""
    expert = gates.expert_index
    token = jnp.arange(expert.size // expert.shape[-1], dtype=expert.dtype).reshape(*expert.shape[:-1], 1)
    return dataclasses.replace(gates, expert_index=copies[expert, token % counts[expert]].astype(expert.dtype))
