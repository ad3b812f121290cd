"""Floating point operations of a step, with what is made twice (report sections 3.2.3, 4.2)."""

from __future__ import annotations

import dataclasses

from dsv3_jax.counts import count_flops
from dsv3_jax.planning.config import PlanConfig
from dsv3_jax.planning.forward_operations import attention_core, forward_operations, up_projections
from dsv3_jax.planning.stage_time import stage_operations

_FORWARD_AND_BACKWARD = 3


@dataclasses.dataclass(frozen=True)
class Operations:
    """Floating point operations a device makes in a step, by where they run; recomputation included."""

    fp8_products: float
    products: float
    attention: float

    @property
    def total(self) -> float:
        return self.fp8_products + self.products + self.attention


def operations(config: PlanConfig, *, once: bool = False) -> Operations:
    """Of the whole step, divided evenly over the devices; with `once`, without what is made twice."""
    if config.has_pipelined_step and not once:
        return by_place(config, *stage_operations(config))
    model, policy = config.model, config.rematerialisation
    terms = dict(count_flops(model, config.sequence_length).terms)
    linear, attention, plain = forward_operations(model, config.sequence_length)
    recomputed = {"none": 0.0, "report": up_projections(model), "products": terms["routed_experts"], "full": linear}[
        policy
    ]
    if config.spreads_experts and policy in ("none", "report"):
        recomputed += terms["routed_experts"]
    if once:
        return by_place(config, *(_FORWARD_AND_BACKWARD * term for term in (linear, attention, plain)))
    core = attention * (_FORWARD_AND_BACKWARD + 1)  # its logits are never kept
    if config.is_training_step:
        made = attention_core(model, config.sequence_length)
        core = attention * made.computed * (made.backward + (1 if policy == "none" else 2))
    return by_place(config, _FORWARD_AND_BACKWARD * linear + recomputed, core, _FORWARD_AND_BACKWARD * plain)


def by_place(config: PlanConfig, linear: float, attention: float, plain: float) -> Operations:
    """Operations a token as those of a device, by where they run."""
    a_device = config.tokens_a_step / config.target.devices
    linear, attention, plain = (a_device * term for term in (linear, attention, plain))
    if config.formats.is_fp8:
        return Operations(fp8_products=linear, products=plain, attention=attention)
    return Operations(fp8_products=0.0, products=linear + plain, attention=attention)
