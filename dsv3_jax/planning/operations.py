"""Counts the floating point operations of a step, recomputation included (report sections 3.2.3, 4.2)."""

from __future__ import annotations

import dataclasses

from dsv3_jax.counts import count_flops
from dsv3_jax.planning.attention_form import attention_core, attention_form, keeps_core
from dsv3_jax.planning.config import PlanConfig
from dsv3_jax.planning.forward_operations import EXPERTS_AGAIN, forward_operations, recomputed_operations
from dsv3_jax.planning.stage_parts import layer_runs, operations_per_token

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
    model = config.model
    linear, attention, plain = forward_operations(model, config.sequence_length)
    core = attention_core(model, config.sequence_length, attention_form(config))
    fp8 = config.recipe.fp8 is not None
    again = recomputed_operations(
        model, config.rematerialisation, on_mesh=config.target.devices > 1, fp8=fp8, keeps_core=keeps_core(config)
    )
    mtp = model.num_nextn_predict_layers
    recomputed = again.attention * (model.num_hidden_layers + mtp) + again.dense * model.num_dense_layers
    recomputed += again.experts * (model.num_moe_layers + mtp)
    attention *= core.computed * (1 + core.backward + again.core)
    plain = _FORWARD_AND_BACKWARD * plain + again.router * (model.num_moe_layers + mtp)
    return _of_device(config, _FORWARD_AND_BACKWARD * linear + recomputed, attention, plain)


def expert_operations(config: PlanConfig, rank: int) -> float:
    """Returns the operations of routed experts that a rank of the stage axis computes while tokens are exchanged.

    Every part of a backward pass computes gate and up projections again, and the gradients by the experts' inputs. The
    gradients by their weights follow behind the exchange.
    """
    model, runs = config.model, layer_runs(config)[rank]
    forward, backward = (of.get("moe", 0) + of.get("mtp", 0) for of in (runs.forward, runs.backward))
    one = count_flops(model, 1).terms["routed_experts"] / max(model.num_moe_layers, 1)
    return (forward + (1 + EXPERTS_AGAIN) * backward) * one * config.tokens_per_pass / config.mesh.tensor


def operations_without_recomputation(config: PlanConfig) -> Operations:
    """Returns the operations of a step in which nothing is computed twice and attention skips what is masked."""
    forward = forward_operations(config.model, config.sequence_length)
    return _of_device(config, *(_FORWARD_AND_BACKWARD * term for term in forward))


def _of_device(config: PlanConfig, linear: float, attention: float, plain: float) -> Operations:
    """Returns operations per token as those of a device, by where they are computed."""
    tokens = config.tokens_per_step / config.target.devices
    linear, attention, plain = (tokens * term for term in (linear, attention, plain))
    if config.recipe.fp8 is not None:
        return Operations(fp8_products=linear, products=plain, attention=attention)
    return Operations(fp8_products=0.0, products=linear + plain, attention=attention)
