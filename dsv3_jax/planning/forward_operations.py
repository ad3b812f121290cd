"""Counts the operations per token of a forward pass."""

from __future__ import annotations

from dsv3_jax.config import ModelConfig
from dsv3_jax.counts import count_flops


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
