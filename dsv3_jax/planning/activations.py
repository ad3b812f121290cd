"""Calculates the bytes of activations on one device of a training step at its peak (report sections 3.2.3, 3.3.3).

What a block keeps is read from the traced block (`traced_block`). The load of the experts is taken to be even, as the
auxiliary-loss-free balancing makes it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import defaultdict
from collections.abc import Callable
from typing import Literal

from dsv3_jax.model import MOST_UNROLLED_LAYERS
from dsv3_jax.pipeline.facts import schedule_facts
from dsv3_jax.pipeline.residuals import SlotLayout
from dsv3_jax.pipeline.slots import moe_layers_of_stages
from dsv3_jax.pipeline.weights import Format
from dsv3_jax.planning.attention_form import attention_core_memory, attention_form, keeps_core
from dsv3_jax.planning.config import PlanConfig
from dsv3_jax.planning.exchange import TokenExchange
from dsv3_jax.planning.traced_block import (
    BlockKind,
    BlockShape,
    TracedBlock,
    kept_by_block,
    residuals_of_block,
    traced_block,
)
from dsv3_jax.planning.weights import LayerKind, abstract_mesh, layers_of_rank, stages_per_rank, weights_of
from dsv3_jax.sharding.mesh import MeshConfig
from dsv3_jax.sharding.ranks import axes_of
from dsv3_jax.sharding.rules import gathered_dimension, weight_axes

_FLOAT32 = 4  # bytes
_LOSS_COPIES = 3  # of the vocabulary's logits: logits, their exponentials and their gradient
LAYERS: tuple[LayerKind, ...] = ("dense", "moe", "mtp")
"""Kinds of layers that have a transformer block."""

StackKind = Literal["dense", "moe"]
"""A kind of layer of which stages have a stack."""

_BLOCKS_OF: dict[LayerKind, tuple[BlockKind, ...]] = {
    "dense": ("dense",),
    "moe": ("moe",),
    "mtp": ("join", "moe"),
    "head": ("head",),
}


@dataclasses.dataclass(frozen=True)
class ActivationMemory:
    """The bytes of activations on one device.

    Attributes:
      kept: bytes kept from the forward to the backward pass, over all layers and micro-batches in flight, by name.
      kept_per_layer: bytes that one layer keeps of one micro-batch, by kind of layer.
      micro_batches: micro-batches in flight at the peak.
      recomputed: bytes of one layer while its backward pass runs.
      loss: bytes of the vocabulary's logits and of their gradient.
    """

    kept: dict[str, float]
    kept_per_layer: dict[LayerKind, float]
    micro_batches: float
    recomputed: float
    loss: float

    @property
    def total(self) -> float:
        """What is kept, and the larger of what the loss and a layer's backward pass need."""
        return sum(self.kept.values()) + max(self.recomputed, self.loss)


def activation_memory(config: PlanConfig) -> ActivationMemory:
    """Returns the activations of any rank."""
    return _with_stages(config) if config.has_stages else _without_stages(config)


def _without_stages(config: PlanConfig) -> ActivationMemory:
    kept: dict[str, float] = defaultdict(float)
    per_layer: dict[LayerKind, float] = {}
    layers = layers_of_rank(config)
    for kind in LAYERS:
        if count := layers[kind]:
            of_layer = kept_of_layer(config, kind, unrolled=kind == "mtp" or count <= MOST_UNROLLED_LAYERS)
            per_layer[kind] = sum(of_layer.values())
            for name, size in of_layer.items():
                kept[name] += count * size
    return ActivationMemory(
        kept=dict(kept),
        kept_per_layer=per_layer,
        micro_batches=1,
        recomputed=max(_backward(config, "moe" if kind == "mtp" else kind) for kind in per_layer),
        loss=_LOSS_COPIES * _logits(config, _tokens_per_piece(config)[0]),
    )


def _with_stages(config: PlanConfig) -> ActivationMemory:
    """Returns the activations of a stage, which keeps the residuals of its layers in slots (`pipeline.residuals`)."""
    facts = schedule_facts(config.schedule, config.mesh.stage, config.passes)
    stacks: tuple[StackKind, ...] = ("dense", "moe") if config.model.num_dense_layers else ("moe",)
    slot = _slot_bytes(config)
    received = (facts.activations + facts.gradients) * config.hidden_bytes
    return ActivationMemory(
        kept={f"kept in {dtype}": facts.kept * size for dtype, size in slot.items()}
        | {"received from other stages": received},
        kept_per_layer={kind: sum(_slot_bytes(config, kind).values()) for kind in stacks},
        micro_batches=facts.kept,
        recomputed=max(_layer_backward(config, kind) for kind in stacks),
        loss=_predictions(config),
    )


def _slot_bytes(config: PlanConfig, kind: BlockKind | None = None) -> dict[str, float]:
    """Returns the bytes of a slot for one micro-batch by dtype; with `kind`, of what one layer takes of it."""
    blocks: tuple[BlockKind, ...] = ("moe", "dense") if config.model.num_dense_layers else ("moe",)

    def of_ranks(tensor: int) -> Counter[str]:
        types = {block: residuals_of_block(_shape(config, block, tensor), config.rematerialisation) for block in blocks}
        layers = moe_layers_of_stages(config.model, config.mesh.stage)
        layout = SlotLayout.of(types["moe"], layers, types.get("dense", ()), config.model.num_dense_layers)
        if kind is not None:
            layout = SlotLayout.of(types[kind], (1,))
        return layout.bytes_by_dtype

    one = of_ranks(1)
    two = of_ranks(2) if config.mesh.tensor > 1 else one
    return {dtype: _of_rank(config, size, two[dtype]) for dtype, size in one.items()}


def _layer_backward(config: PlanConfig, kind: StackKind) -> float:
    """Returns the bytes of one layer's backward pass, with its sliced weights and gradients before they are added."""
    return _sliced(config, kind) + gathered_bytes(config, kind, ahead=0) + _backward(config, kind)


def _sliced(config: PlanConfig, kind: StackKind) -> float:
    """Returns the bytes of a layer's weights, which are sliced from those of all layers, and of their gradients."""
    weights = sum(w.in_step * (w.working + w.itemsize) for w in weights_of(config) if w.kind == kind)
    return weights / layers_of_rank(config)[kind]


def _predictions(config: PlanConfig) -> float:
    """Returns the bytes of the losses, of which every stage computes a part: for its rows of the head.

    They are the logits, the rows' gradient, hidden states of all depths and their gradients, and of the MTP modules
    what they keep, the weights of their blocks and the gradients before they are added. With an fsdp axis the rows are
    gathered, and their gradient is reduce-scattered from whole ones in float32.
    """
    model, stages, depths = config.model, config.mesh.stage, config.model.num_nextn_predict_layers
    directions = stages_per_rank(config)
    tokens, whole = _tokens_per_piece(config, directions, chunks=stages)
    logits = (1 + depths if whole else _LOSS_COPIES) * directions * _logits(config, tokens) / stages
    head = model.vocab_size * model.hidden_size / config.mesh.tensor / stages
    copies = config.recipe.dtype.itemsize
    if config.mesh.fsdp > 1:
        copies += config.recipe.dtype.itemsize + _FLOAT32
    hidden = 2 * directions * (1 + depths) * config.hidden_bytes
    of_module = sum(kept_of_layer(config, "mtp").values()) + _sliced(config, "moe")
    return logits + copies * head + hidden + depths * of_module


def _tokens_per_piece(config: PlanConfig, times: int = 1, chunks: int = 1) -> tuple[int, bool]:
    """Returns the tokens whose logits a rank holds at a time, and whether they are all (`losses.cross_entropies`).

    Args:
      times: how many times the tokens of a micro-batch the losses are computed of together.
      chunks: how many times `loss_chunk` tokens are computed at a time.
    """
    length = config.sequence_length // config.mesh.context
    pieces = min(-(-times * config.tokens_per_pass // (chunks * config.run.training.loss_chunk)), length)
    return config.micro_batch_size * -(-length // pieces), pieces == 1


def _logits(config: PlanConfig, tokens: float) -> float:
    return tokens * config.model.vocab_size / config.mesh.tensor * _FLOAT32


def kept_of_layer(config: PlanConfig, kind: LayerKind, *, unrolled: bool = False) -> dict[str, float]:
    """Returns the bytes that a layer keeps of a micro-batch under the run's rematerialisation policy, by what they are.

    Args:
      kind: "dense", "moe" or "mtp".
      unrolled: whether the layer is outside a loop over layers, so that the compiler decides what it keeps where the
        policy leaves all to it.
    """
    if kind == "mtp":  # its inputs are joined outside of what the policy covers
        joined = _traced(config, "join", lambda block: block.working - block.inputs)
        return kept_of_layer(config, "moe", unrolled=True) | {"joined inputs of MTP": joined}
    policy = config.rematerialisation
    if policy == "none" and unrolled:
        return {"kept without rematerialisation": working_bytes(config, kind)}
    (block,) = _BLOCKS_OF[kind]
    one = kept_by_block(_shape(config, block, 1), policy)
    two = kept_by_block(_shape(config, block, 2), policy) if config.mesh.tensor > 1 else one
    kept = {name: _of_rank(config, size, two.get(name, 0.0)) for name, size in one.items()}
    if policy == "none" and config.mesh.context > 1:
        kept["latents of all ranks' tokens"] = latent_bytes(config)
    return kept


def working_bytes(config: PlanConfig, kind: LayerKind) -> float:
    """Returns the bytes of activations that a layer's backward pass reads of a micro-batch, its inputs included."""
    gathered = latent_bytes(config) if kind in LAYERS and config.mesh.context > 1 else 0.0
    return gathered + sum(_traced(config, block, lambda block: block.working) for block in _BLOCKS_OF[kind])


def latent_bytes(config: PlanConfig) -> float:
    """Returns the bytes of what a layer's attention needs of all tokens of a micro-batch to compute its heads.

    They are the inputs of the up-projections and the rotary keys (`sharding.attention_on_ranks`).
    """
    model = config.model
    numbers = (model.q_lora_rank or model.hidden_size) + model.kv_lora_rank + model.qk_rope_head_dim
    return config.micro_batch_size * config.sequence_length * numbers * config.recipe.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class GatheredWeight:
    """A weight that FSDP all-gathers.

    Attributes:
      elements: elements on a device once it is gathered.
      width: bytes of an element in the format in which it is gathered.
      ranks: devices among which its shards are.
    """

    elements: float
    width: float
    ranks: int


def gathered_weights(config: PlanConfig, kind: LayerKind) -> tuple[GatheredWeight, ...]:
    """Returns the weights of a layer that FSDP all-gathers."""
    shapes = tuple(_shape(config, block, 1) for block in _BLOCKS_OF[kind])
    return _gathered(shapes, config.mesh)


@functools.lru_cache(maxsize=4096)
def _gathered(shapes: tuple[BlockShape, ...], mesh: MeshConfig) -> tuple[GatheredWeight, ...]:
    found = []
    for weight in [weight for shape in shapes for weight in traced_block(shape).gathered]:
        axes = weight_axes(weight.shape, abstract_mesh(mesh))
        dimension = gathered_dimension(weight.shape, axes)
        if dimension is not None:
            shards = [math.prod(mesh.sizes[axis] for axis in axes_of(over)) for over in axes]
            ranks = shards.pop(dimension)
            elements = math.prod(weight.shape.shape) / math.prod(shards)
            found.append(GatheredWeight(elements, Format(weight.dtype).bytes, ranks))
    return tuple(found)


def gathered_bytes(config: PlanConfig, kind: LayerKind, *, ahead: int) -> float:
    """Returns the bytes of a layer's all-gathered weights, of `ahead` more that follow, and of their gradients."""
    weights = gathered_weights(config, kind)
    return sum(weight.elements * ((1 + ahead) * weight.width + _FLOAT32) for weight in weights)


def _backward(config: PlanConfig, kind: LayerKind) -> float:
    """Returns the bytes that the backward pass of one layer reads and computes."""
    buffers = 0.0
    if kind == "moe" and config.target.devices > 1:
        inner = config.model.moe_intermediate_size / config.mesh.tensor * config.recipe.dtype.itemsize
        buffers = TokenExchange.of(config).memory(inner)
    return working_bytes(config, kind) + attention_core_memory(config) + buffers


def _shape(config: PlanConfig, kind: BlockKind, tensor: int) -> BlockShape:
    on_mesh, form = config.target.devices > 1, attention_form(config)
    length = config.sequence_length
    return BlockShape(config.model, kind, config.recipe, tensor, length, on_mesh, form, keeps_core(config))


def _traced(config: PlanConfig, kind: BlockKind, figure: Callable[[TracedBlock], float]) -> float:
    """Returns a figure of a block, on one rank of the tensor axis."""
    one = figure(traced_block(_shape(config, kind, 1)))
    two = figure(traced_block(_shape(config, kind, 2))) if config.mesh.tensor > 1 else one
    return _of_rank(config, one, two)


def _of_rank(config: PlanConfig, one: float, two: float) -> float:
    """Returns the bytes of a micro-batch on a rank, from those of a sequence with one and with two tensor ranks.

    A part of the bytes is divided over the tensor axis, the rest is on all its ranks. Along the context axis a rank has
    its part of the tokens, or of the heads of all tokens, which are as many bytes.
    """
    return config.micro_batch_size / config.mesh.context * (one - 2 * (one - two) * (1 - 1 / config.mesh.tensor))
