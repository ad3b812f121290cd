"""Operations a token of one forward pass, as products are really made; of the attention core in both directions."""

from __future__ import annotations

import dataclasses
import math

from dsv3_jax.config import ModelConfig
from dsv3_jax.counts import count_flops
from dsv3_jax.planning.activations import CHUNK, WHOLE_ROWS

_CHUNK_MULTIPLE = 128  # chunks of a long sequence have whole multiples of it


def forward_operations(model: ModelConfig, length: int) -> tuple[float, float, float]:
    """Operations a token of one forward pass, MTP modules included: linear maps; attention core; head and router."""
    counts = count_flops(model, length)
    terms = dict(counts.terms)
    attention, head, router = (terms.pop(name) for name in ("attention_core", "head", "router"))
    layers, mtp = model.num_hidden_layers, model.num_nextn_predict_layers
    linear = sum(terms.values())
    if mtp:
        share = (counts.mtp_forward - mtp * head - mtp * 4.0 * model.hidden_size**2) / mtp - attention / layers
        linear += mtp * share
        attention += mtp * attention / layers
        head += mtp * (head + 4.0 * model.hidden_size**2)
    return linear, attention, head + router


@dataclasses.dataclass(frozen=True)
class AttentionCore:
    """What the attention core computes, of a long sequence in tiles (`modules.tiled_attention`).

    Attributes:
      backward: operations over those forward.
      computed: products made over the causal half of them: tiles on the diagonal are computed whole.
    """

    backward: float
    computed: float


def attention_core(model: ModelConfig, length: int) -> AttentionCore:
    """Forward two products, of the widths of keys and of values. Backward the logits anew, and four for gradients."""
    keys, values = model.qk_head_dim, model.v_head_dim
    if length <= WHOLE_ROWS:  # in two chunks, whose weights are kept
        return AttentionCore(2.0, 1.5)
    chunks = -(-length // CHUNK)
    chunk = math.ceil(length / chunks / _CHUNK_MULTIPLE) * _CHUNK_MULTIPLE
    return AttentionCore((3 * keys + 2 * values) / (keys + values), chunks * (chunks + 1) * (chunk / length) ** 2)


def up_projections(model: ModelConfig) -> float:
    """Operations a token to make queries, keys and values from their latents anew."""
    queries = model.num_attention_heads * model.qk_head_dim * (model.q_lora_rank or model.hidden_size)
    keys = model.num_attention_heads * (model.qk_nope_head_dim + model.v_head_dim) * model.kv_lora_rank
    return 2.0 * (queries + keys) * (model.num_hidden_layers + model.num_nextn_predict_layers)
