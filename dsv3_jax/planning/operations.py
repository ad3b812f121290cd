"""Counts the floating point operations of a step, recomputation included (report sections 3.2.3, 4.2)."""

from __future__ import annotations

import dataclasses

from dsv3_jax.counts import count_flops
from dsv3_jax.planning.attention_form import attention_core, attention_form
from dsv3_jax.planning.config import PlanConfig
from dsv3_jax.planning.forward_operations import forward_operations
from dsv3_jax.planning.stage_parts import operations_per_token

_FORWARD_AND_BACKWARD = 3


@dataclasses.dataclass(frozen=True)
class Operations:
    """Floating point operations of one device in a step, by where they are computed; recomputation included."""

    fp8_products: float
    products: float
    attention: float

    @property
    def total(self) -> float:
        """All operations."""
        return self.fp8_products + self.products + self.attention


def operations(config: PlanConfig) -> Operations:
    """Returns the operations of a step, divided evenly over the devices."""
    if config.has_stages:
        return _of_device(config, *operations_per_token(config))
    model, policy = config.model, config.rematerialisation
    linear, attention, plain = forward_operations(model, config.sequence_length)
    terms = count_flops(model, config.sequence_length).terms
    core = attention_core(model, config.sequence_length, attention_form(config))
    recomputed = {"none": 0.0, "report": _up_projections(config), "products": terms["routed_experts"], "full": linear}[
        policy
    ]
    if config.target.devices > 1 and policy in ("none", "report"):
        recomputed += terms["routed_experts"]  # by the exchange
    attention *= core.computed * (core.backward + (1 if policy == "none" else 2))
    return _of_device(config, _FORWARD_AND_BACKWARD * linear + recomputed, attention, _FORWARD_AND_BACKWARD * plain)


def operations_without_recomputation(config: PlanConfig) -> Operations:
    """Returns the operations of a step in which nothing is computed twice and attention skips what is masked."""
    forward = forward_operations(config.model, config.sequence_length)
    return _of_device(config, *(_FORWARD_AND_BACKWARD * term for term in forward))


def _up_projections(config: PlanConfig) -> float:
    """Returns operations per token of queries, keys and values from their latents, in all layers."""
    model = config.model
    queries = model.num_attention_heads * model.qk_head_dim * (model.q_lora_rank or model.hidden_size)
    keys = model.num_attention_heads * (model.qk_nope_head_dim + model.v_head_dim) * model.kv_lora_rank
    return 2.0 * (queries + keys) * (model.num_hidden_layers + model.num_nextn_predict_layers)


def _of_device(config: PlanConfig, linear: float, attention: float, plain: float) -> Operations:
    """Returns operations per token as those of a device, by where they are computed."""
    tokens = config.tokens_per_step / config.target.devices
    linear, attention, plain = (tokens * term for term in (linear, attention, plain))
    if config.recipe.fp8 is not None:
        return Operations(fp8_products=linear, products=plain, attention=attention)
    return Operations(fp8_products=0.0, products=linear + plain, attention=attention)
