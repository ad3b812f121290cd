"""A loaded model with its experts as a placement holds them: physical experts, some of them copies (section 3.4)."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

import pallas_kernels
from dsv3_jax.errors import ConfigError
from dsv3_jax.model import DeepSeekV3
from dsv3_jax.modules.moe import Experts, MixtureOfExperts
from dsv3_jax.sharding.placement import Placement


class ExpertCopies(nnx.Variable):
    """Where the copies of each logical expert are, and how many: no parameter."""


class PlacedExperts(Experts):
    """Physical experts behind a router that knows logical ones; a token's place in the batch chooses the copy.

    Arrays of stacked layers have a leading layer axis, as the model's own.
    """

    def __init__(self, experts: Experts, logical: Int[Array, "*L P"], copies: Array, counts: Array):
        self.precision = experts.precision
        # A placement need not keep the router's groups together: a token may go to more of them than the router says.
        self.exchange = experts.exchange and experts.exchange.for_any_placement
        self.gate_up = nnx.Param(_gather(experts.gate_up[...], logical))
        self.down = nnx.Param(_gather(experts.down[...], logical))
        self.copies = ExpertCopies(copies)
        self.counts = ExpertCopies(counts)

    def __call__(self, u: Float[Array, "N d"], gates: pallas_kernels.Gates) -> Float[Array, "N d"]:
        return super().__call__(u, _to_physical(gates, self.copies[...], self.counts[...]))

    def of_layer(
        self, u: Float[Array, "N d"], gates: pallas_kernels.Gates, layer: Int[Array, ""]
    ) -> Float[Array, "N d"]:
        return super().of_layer(u, _to_physical(gates, self.copies[...][layer], self.counts[...][layer]), layer)


def with_placed_experts(model: DeepSeekV3, placement: Placement) -> DeepSeekV3:
    """The same model, for inference, with the placement's physical experts; its outputs are the model's.

    Args:
      placement: one row a MoE layer, the MTP blocks' last.

    Raises:
      ConfigError: a placement of other layers or experts.
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
        _replace(placed.moe_blocks.feed_forward, [table[:main] for table in tables])
    for depth, module in enumerate(placed.mtp):
        _replace(module.block.feed_forward, [table[main + depth] for table in tables])
    return placed


def _replace(layer: nnx.Module, tables: list[Array]) -> None:
    if isinstance(layer, MixtureOfExperts):
        layer.experts = PlacedExperts(layer.experts, *tables)


def _gather(weights: Array, logical: Int[Array, "*L P"]) -> Array:
    """Experts of each physical place; stacked layers each by their own row."""
    if logical.ndim == 1:
        return weights[logical]
    return weights[jnp.arange(len(logical))[:, None], logical]


def _to_physical(
    gates: pallas_kernels.Gates, copies: Int[Array, "E R"], counts: Int[Array, " E"]
) -> pallas_kernels.Gates:
    """Logical experts become copies of theirs, in turn by the token's place."""
    expert = gates.expert_index
    token = jnp.arange(expert.size // expert.shape[-1], dtype=expert.dtype).reshape(*expert.shape[:-1], 1)
    return dataclasses.replace(gates, expert_index=copies[expert, token % counts[expert]].astype(expert.dtype))
