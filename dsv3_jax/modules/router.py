"""The router of DeepSeekMoE: affinities, node-limited selection with a bias, gates (report section 2.1.2, Eq. 13-16).

This file computes the logits u_t^T e_i. Eq. 13-16 follow in `pallas_kernels/routing/reference.py`. The bias moves the
selection only; gates come from the affinities without it.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

import pallas_kernels
from dsv3_jax.config import ModelConfig
from dsv3_jax.modules.devices import Devices
from dsv3_jax.modules.parameter import ParameterShape
from dsv3_jax.precision.keeping import keep
from dsv3_jax.precision.split_product import split_product
from dsv3_jax.precision.tiled_weight import TiledWeight
from pallas_kernels.device import target_platform


class RouterBias(nnx.Variable):
    """The selection bias b_i of each expert: state that the training step moves (`dsv3_jax.modules.balance`).

    It is a Variable type of its own, so that no optimizer, weight decay or gradient ever sees it.
    """


class Router(nnx.Module):
    """Chooses each token's experts and their gates.

    The weight's row i is e_i, the centroid of expert i.
    """

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, devices: Devices, rngs: nnx.Rngs):
        self.config = config
        self.devices = devices
        self.shape = ParameterShape((config.n_routed_experts, config.hidden_size), ("latent", "embed"))
        self.weight = self.shape.normal(rngs, config.initializer_range, dtype)
        if config.has_router_bias:
            self.bias = RouterBias(jnp.zeros((config.n_routed_experts,), jnp.float32))

    def __call__(
        self,
        u: Float[Array, "B T d"],
        token_mask: Bool[Array, "B T"] | None = None,
        experts: Int[Array, "B T K"] | None = None,
    ) -> pallas_kernels.Gates:
        """Returns experts and gates of every token, with the balance statistics of every sequence.

        Args:
          experts: the experts of each token. The statistics remain those of the experts that this router chooses.
        """
        config = self.config
        with jax.named_scope("router_logits"):
            weight = self.weight[...]
            logits = self.devices.multiply(
                _logits, u, weight, self.shape, batch_axes=2, in_axes=1, gather_dtype=weight.dtype
            )
        with jax.named_scope("gate"):
            logits = keep(logits)
            gates = self.devices.gate(
                logits,
                self.bias[...] if config.has_router_bias else None,
                token_mask,
                num_experts_per_tok=config.num_experts_per_tok,
                n_group=config.n_group,
                topk_group=config.topk_group,
                scoring_func=config.scoring_func,
                group_score="top2_sum" if config.topk_method == "noaux_tc" else "max",
                norm_topk_prob=config.norm_topk_prob,
                routed_scaling_factor=config.routed_scaling_factor,
            )
            if experts is None:
                return gates
            weights = pallas_kernels.gates_of_experts(
                logits,
                experts,
                scoring_func=config.scoring_func,
                norm_topk_prob=config.norm_topk_prob,
                routed_scaling_factor=config.routed_scaling_factor,
            )
            return dataclasses.replace(gates, expert_index=experts, gate=weights)


def _logits(u: Float[Array, "B T d"], weight: Float[Array, "E d"] | TiledWeight) -> Float[Array, "B T E"]:
    """Returns u_t^T e_i in float32 whatever the recipe: a bias step of 0.001 is far below bfloat16's spacing."""
    if isinstance(weight, TiledWeight):
        return weight.product(u, jnp.float32)
    if u.dtype == jnp.bfloat16 and target_platform() != "cpu":
        return split_product(u, weight.astype(jnp.float32))
    wide = jnp.promote_types(u.dtype, jnp.float32)
    contract_last = (((2,), (1,)), ((), ()))
    return lax.dot_general(u.astype(wide), weight.astype(wide), contract_last, precision=lax.Precision.HIGHEST)
