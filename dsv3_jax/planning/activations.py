"""Bytes of activations a token leaves behind for the backward pass, layer by layer (report sections 3.2.3, 3.3.3).

Per token and layer, on one device; what belongs to heads, feed-forward widths or the vocabulary is divided over the
tensor axis. Load on the experts is taken to be even, as the auxiliary-loss-free balancing makes it.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict

from dsv3_jax.planning.config import PlanConfig
from dsv3_jax.planning.layers import LayerKind

_WIDE = 4  # bytes of float32
CHUNK = 512  # queries whose logits the attention core holds at a time, and in long sequences keys
WHOLE_ROWS = 1024  # the longest sequence of which it holds logits with all keys
_LOGIT_COPIES = 3  # logits, weights and their gradient
_LOGITS_IN_LOSS = 3  # float32 copies of the vocabulary's logits
EXCHANGE_ROOM = 2
"""Rows of the buffers between experts on different devices, over those of an even load."""


@dataclasses.dataclass(frozen=True)
class ActivationMemory:
    """Bytes on one device.

    Attributes:
      kept: from the forward to the backward pass, by what it is, over all layers and micro-batches in flight.
      kept_a_layer: of one layer and one micro-batch, by kind of layer.
      micro_batches: that are in flight at the peak.
      recomputed: one layer's activations while its backward pass runs, the attention core's logits included.
      loss: logits of the vocabulary, and their gradient.
    """

    kept: dict[str, float]
    kept_a_layer: dict[LayerKind, float]
    micro_batches: float
    recomputed: float
    loss: float

    @property
    def total(self) -> float:
        """What is kept, and the larger of what the loss and a layer's backward pass need beside it."""
        return sum(self.kept.values()) + max(self.recomputed, self.loss)


def kept_of_layer(config: PlanConfig, kind: LayerKind, policy: str) -> dict[str, float]:
    """Bytes a token that one layer keeps under a rematerialisation policy, by what they are."""
    if kind in ("embedding", "head"):
        return {}
    model, formats, tensor = config.model, config.formats, config.mesh.tensor
    d, width = model.hidden_size, formats.compute
    kept: dict[str, float] = {"layer input": d * width}
    if kind == "mtp":
        kept["layer input"] += d * width  # what the projection joins, beside what it gives
    if policy == "full":
        return kept
    heads = model.num_attention_heads / tensor
    latents = (model.q_lora_rank or 0) + model.kv_lora_rank + model.qk_rope_head_dim
    kept["attention latents"] = latents * width
    if policy in ("products", "none"):
        per_head = model.qk_head_dim + model.qk_nope_head_dim + model.v_head_dim
        kept["queries, keys, values"] = heads * per_head * width
    if policy in ("report", "none"):
        kept["attention core's output"] = heads * model.v_head_dim * formats.attention_output
    kept["attention's output"] = d * width
    if kind == "dense":
        kept |= _feed_forward(model.intermediate_size / tensor, config, policy)
    else:
        kept |= _mixture(config, policy)
    if policy == "none":
        # The norms' inputs in float32 and outputs, which are the linear maps' inputs, and the normed latents.
        kept["norms"] = 2 * d * (_WIDE + formats.linear_input) + latents * (_WIDE + formats.linear_input)
    return kept


def _feed_forward(width: float, config: PlanConfig, policy: str) -> dict[str, float]:
    formats = config.formats
    kept = {"SwiGLU input": 2 * width * (formats.swiglu_input if policy != "products" else formats.compute)}
    if policy == "products":
        kept["feed-forward output"] = config.model.hidden_size * formats.compute
    if policy == "none" and not formats.is_fp8:
        kept["SwiGLU output"] = width * formats.compute
    return kept


def _mixture(config: PlanConfig, policy: str) -> dict[str, float]:
    model, formats, tensor = config.model, config.formats, config.mesh.tensor
    kept: dict[str, float] = {"router": model.n_routed_experts * _WIDE}
    shared = model.n_shared_experts * model.moe_intermediate_size / tensor
    if shared:
        kept |= _feed_forward(shared, config, policy)
    if policy == "products":
        return kept  # products of one matrix an expert are not among what this policy keeps
    if config.spreads_experts:
        return kept
    rows = model.num_experts_per_tok
    routed = _feed_forward(rows * model.moe_intermediate_size / tensor, config, policy)
    for name, size in routed.items():
        kept[name] = kept.get(name, 0.0) + size
    kept["experts' output"] = rows * model.hidden_size * formats.compute
    if policy == "none":
        kept["experts' input"] = rows * model.hidden_size * formats.linear_input
    return kept


def activation_memory(config: PlanConfig, layers: Counter[LayerKind]) -> ActivationMemory:
    """Of a rank that holds these layers, at the moment it holds most; but for the step with stages (`stage_step`)."""
    tokens = config.tokens_a_pass
    in_flight = micro_batches_in_flight(config)
    kept: dict[str, float] = defaultdict(float)
    kept_a_layer: dict[LayerKind, float] = {}
    for kind, count in layers.items():
        of_layer = kept_of_layer(config, kind, config.rematerialisation)
        kept_a_layer[kind] = tokens * sum(of_layer.values())
        for name, size in of_layer.items():
            kept[name] += count * in_flight * tokens * size
    working = [tokens * sum(kept_of_layer(config, kind, "none").values()) for kind in layers]
    has_head = layers["head"] > 0
    vocabulary = config.model.vocab_size / config.mesh.tensor
    return ActivationMemory(
        kept=dict(kept),
        kept_a_layer={kind: size for kind, size in kept_a_layer.items() if size},
        micro_batches=in_flight,
        recomputed=max(working) + attention_core_memory(config) + exchange_buffers(config),
        loss=has_head * _LOGITS_IN_LOSS * tokens * vocabulary * _WIDE,
    )


def attention_core_memory(config: PlanConfig) -> float:
    """Logits of the attention core's backward pass; and the gradients that its loop over tiles carries."""
    model, width = config.model, config.formats.compute
    heads, length = model.num_attention_heads / config.mesh.tensor, config.sequence_length
    keys = length if length <= WHOLE_ROWS else CHUNK
    logits = config.micro_batch_size * heads * min(CHUNK, length) * keys * _WIDE * _LOGIT_COPIES
    if length <= WHOLE_ROWS:
        return logits
    # Queries' are added to tile by tile, in float32; keys' and values' are so for one chunk at a time.
    a_token = model.qk_head_dim * _WIDE + (model.qk_head_dim + model.v_head_dim) * width
    a_chunk = (model.qk_head_dim + model.v_head_dim) * _WIDE
    return logits + config.micro_batch_size * heads * (length * a_token + CHUNK * a_chunk)


def exchange_buffers(config: PlanConfig) -> float:
    """Room for a piece's worst case: rows as they arrive, sorted, multiplied, and the gradients of each."""
    if not config.spreads_experts:
        return 0.0
    model = config.model
    rows = EXCHANGE_ROOM * config.tokens_a_pass * model.num_experts_per_tok
    a_row = 2 * model.hidden_size + 3 * model.moe_intermediate_size / config.mesh.tensor
    return 2 * rows * a_row * config.formats.compute


def micro_batches_in_flight(config: PlanConfig) -> float:
    """Micro-batches whose activations a rank of the report's layout holds of every layer it has (its table 2).

    Without stages one. 1F1B and ZB1P hold PP of their stage; DualPipe PP + 1 of its two stages together.
    """
    stages = config.mesh.stage
    if stages == 1:
        return 1
    return (stages + 1) / 2 if config.schedule == "dualpipe" else min(stages, config.passes)
