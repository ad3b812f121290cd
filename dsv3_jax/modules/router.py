"""The router of DeepSeekMoE: affinities, node-limited selection with a bias, gates (report section 2.1.2, Eq. 12-16).

The bias moves the selection only (auxiliary-loss-free balancing); gates come from the affinities without it.
Affinities are computed in float32 whatever the recipe: a bias step of 0.001 is far below bfloat16's spacing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float

import pallas_kernels
from dsv3_jax.config import ModelConfig
from dsv3_jax.modules.linear import normal
from dsv3_jax.precision.keeping import keep


class RouterBias(nnx.Variable):
    """The selection bias of each expert: state that the training step moves by its sign rule.

    A Variable type of its own, so that no optimizer, weight decay or gradient ever sees it.
    """


class Router(nnx.Module):
    """Chooses each token's experts and their gates."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.config = config
        self.gate: Callable[..., pallas_kernels.Gates] = pallas_kernels.gate  # or what spreads it over devices
        self.on_ranks: Any = None  # as in `Linear`
        shape = (config.n_routed_experts, config.hidden_size)
        self.weight = nnx.Param(normal(rngs, shape, config.initializer_range, dtype))
        if config.has_router_bias:
            self.bias = RouterBias(jnp.zeros((config.n_routed_experts,), jnp.float32))

    def __call__(self, u: Float[Array, "B T d"], token_mask: Bool[Array, "B T"] | None = None) -> pallas_kernels.Gates:
        """Experts and gates of every token, with the balance statistics of every sequence."""
        config = self.config
        if self.on_ranks is None:
            logits = _logits(u, self.weight[...])
        else:
            axes = {"batch_axes": 2, "in_axes": 1}
            logits = self.on_ranks(_logits, u, self.weight[...], dtype=self.weight[...].dtype, **axes)
        return self.gate(
            keep(logits),
            self.bias[...] if config.has_router_bias else None,
            num_experts_per_tok=config.num_experts_per_tok,
            n_group=config.n_group,
            topk_group=config.topk_group,
            scoring_func=config.scoring_func,
            group_score="top2_sum" if config.topk_method == "noaux_tc" else "max",
            norm_topk_prob=config.norm_topk_prob,
            routed_scaling_factor=config.routed_scaling_factor,
            token_mask=token_mask,
        )


def _logits(u: Float[Array, "B T d"], weight: Float[Array, "E d"]) -> Float[Array, "B T E"]:
    wide = jnp.promote_types(u.dtype, jnp.float32)
    contract_last = (((2,), (1,)), ((), ()))
    return lax.dot_general(u.astype(wide), weight.astype(wide), contract_last, precision=lax.Precision.HIGHEST)
