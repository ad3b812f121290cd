"""Counts the operations per token of a forward pass, and of the attention core in both directions."""

from __future__ import annotations

import dataclasses

from dsv3_jax.config import ModelConfig
from dsv3_jax.counts import count_flops
from dsv3_jax.modules.attention_core import KEPT_LENGTH, even_chunk


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
class AttentionCore:
    """Operations of the attention core (`modules.tiled_attention` for long sequences).

    Attributes:
      backward: operations of the backward pass over those of the forward pass.
      computed: operations over those of the causal half: tiles on the diagonal are computed whole.
    """

    backward: float
    computed: float


def attention_core(model: ModelConfig, length: int) -> AttentionCore:
    """Returns the operations of the core: two products forward; backward the logits again, and four for gradients."""
    keys, values = model.qk_head_dim, model.v_head_dim
    if length <= KEPT_LENGTH:  # two chunks of queries, whose logits are kept
        return AttentionCore(2.0, 1.5)
    chunk = even_chunk(length)
    chunks = -(-length // chunk)
    return AttentionCore((3 * keys + 2 * values) / (keys + values), chunks * (chunks + 1) * (chunk / length) ** 2)
