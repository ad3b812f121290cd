"""Counts the operations per token of a forward pass."""

from __future__ import annotations

import dataclasses

from dsv3_jax.config import ModelConfig
from dsv3_jax.counts import count_flops

EXPERTS_AGAIN = 2 / 3
"""The part of the experts' products that a backward pass computes again: all but the down projections."""


def forward_operations(model: ModelConfig, length: int) -> tuple[float, float, float]:
    """Returns operations per token, MTP modules included: linear maps, attention core, and output head with router."""
    counts = count_flops(model, length)
    terms = dict(counts.terms)
    attention, head, router = (terms.pop(name) for name in ("attention_core", "head", "router"))
    layers, mtp = model.num_hidden_layers, model.num_nextn_predict_layers
    linear = sum(terms.values())
    if mtp:
        projection = 4.0 * model.hidden_size**2
        block = (counts.mtp_forward - mtp * head - mtp * projection) / mtp - attention / layers
        linear += mtp * block
        attention += mtp * attention / layers
        head += mtp * (head + projection)
    return linear, attention, head + router


@dataclasses.dataclass(frozen=True)
class Recomputed:
    """Operations per token that a backward pass computes again under a rematerialisation policy, of one layer.

    Attributes:
      attention: linear maps of attention.
      dense, experts: the dense feed-forward network, and the routed and shared experts, of a layer that has them.
      router: the router of a MoE layer.
      core: how often the attention core is computed again.
    """

    attention: float
    dense: float
    experts: float
    router: float
    core: int


def recomputed_operations(model: ModelConfig, policy: str, *, on_mesh: bool, fp8: bool, keeps_core: bool) -> Recomputed:
    """Returns what the backward pass of one layer computes again.

    Args:
      on_mesh: whether tokens are sent to experts on other devices. The backward pass of the exchange always computes
        the experts' gate and up projections again.
      fp8: whether linear maps are computed in FP8. The policy "products" does not keep the results of these.
      keeps_core: whether the policy "report" keeps the result of the attention core for the core's own backward pass.
    """
    terms = count_flops(model, 1).terms
    attention = terms["attention_projections"] / model.num_hidden_layers
    dense = terms["dense_feed_forward"] / max(model.num_dense_layers, 1)
    routed = terms["routed_experts"] / max(model.num_moe_layers, 1)
    shared = terms["shared_experts"] / max(model.num_moe_layers, 1)
    without_down = EXPERTS_AGAIN * routed  # the gradients of gates do not need the results of the down projections
    if policy == "full" or (policy == "products" and fp8):
        router = terms["router"] / max(model.num_moe_layers, 1)
        again = without_down if on_mesh or fp8 else routed
        return Recomputed(attention, dense, again + shared, router, core=1)
    again = without_down if on_mesh else routed if policy == "products" else 0.0
    if policy == "report":
        return Recomputed(_up_projections(model), 0.0, again, 0.0, core=int(not keeps_core))
    return Recomputed(0.0, 0.0, again, 0.0, core=int(policy != "none"))


def _up_projections(model: ModelConfig) -> float:
    """Returns operations per token of queries, keys and values from their latents, in one layer."""
    queries = model.num_attention_heads * model.qk_head_dim * (model.q_lora_rank or model.hidden_size)
    keys = model.num_attention_heads * (model.qk_nope_head_dim + model.v_head_dim) * model.kv_lora_rank
    return 2.0 * (queries + keys)
