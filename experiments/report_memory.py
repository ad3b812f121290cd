"""What a device of the report's run keeps: weights, optimizer state and activations (sections 3.2.3, 3.3.3)."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict

from dsv3_jax.config import ModelConfig
from dsv3_jax.counts import count_parameters
from dsv3_jax.planning.activations import ActivationMemory
from dsv3_jax.planning.attention_form import attention_core_memory
from dsv3_jax.planning.config import PlanConfig
from dsv3_jax.planning.weights import LayerKind, StateMemory
from dsv3_jax.sharding.mesh import MeshConfig

_TILE = 4 / 128  # bytes of a float32 scale per number of a 1x128 tile
WIDE = 4  # bytes of float32: gradients, masters, router logits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Formats:
    """Bytes per number, scales included: products' operands and weights, and what is kept or sent (section 3.3.3)."""

    compute: float
    weight: float
    linear_input: float
    attention_output: float
    swiglu_input: float
    dispatch: float
    moment: float = 2  # bfloat16


FORMATS = {
    "bfloat16": Formats(compute=2, weight=2, linear_input=2, attention_output=2, swiglu_input=2, dispatch=2),
    "fp8": Formats(
        compute=2,
        weight=1 + 4 / 128**2,
        linear_input=1 + _TILE,
        attention_output=1.5 + _TILE,  # E5M6
        swiglu_input=1 + _TILE,
        dispatch=1 + _TILE,
    ),
}


@dataclasses.dataclass(frozen=True)
class ParameterGroup:
    """Parameters that the same mesh axes shard; over all other axes they are replicated.

    Attributes:
      elements: how many, unsharded.
      axes: the mesh axes.
      fp8: whether the FP8 recipe multiplies with them in FP8.
    """

    name: str
    elements: int
    axes: tuple[str, ...]
    fp8: bool = False

    def on_a_device(self, mesh: MeshConfig) -> float:
        """Returns the elements of one device."""
        return self.elements / math.prod(mesh.sizes[axis] for axis in self.axes)

    def replicas(self, mesh: MeshConfig) -> int:
        """Returns the devices of one stage that hold the same elements."""
        return math.prod(size for axis, size in mesh.sizes.items() if axis not in ("stage", *self.axes))


_WHOLE, _WIDTHS, _EXPERTS = (), ("tensor",), ("expert", "tensor")


def parameter_groups(model: ModelConfig, kind: LayerKind) -> tuple[ParameterGroup, ...]:
    """Returns the groups of one layer; "mtp" is an MTP module without what it shares."""
    d = model.hidden_size
    if kind == "embedding":
        return (ParameterGroup("embedding", model.vocab_size * d, _WIDTHS),)
    if kind == "head":
        return (ParameterGroup("head", model.vocab_size * d, _WIDTHS), ParameterGroup("norms", d, _WHOLE))
    if kind == "mtp":
        joining = (ParameterGroup("mtp_projection", 2 * d * d, _WHOLE), ParameterGroup("norms", 3 * d, _WHOLE))
        return (*joining, *parameter_groups(model, "moe"))
    block = count_parameters(model).block
    norms = (model.q_lora_rank or 0) + model.kv_lora_rank
    latents = d * (norms + model.qk_rope_head_dim)
    attention = (
        ParameterGroup("norms", 2 * d + norms, _WHOLE),
        ParameterGroup("attention_latents", latents, _WHOLE, fp8=True),
        ParameterGroup("attention_heads", block.attention - latents - norms, _WIDTHS, fp8=True),
    )
    if kind == "dense":
        return (*attention, ParameterGroup("dense_feed_forward", block.dense_feed_forward, _WIDTHS, fp8=True))
    return (
        *attention,
        ParameterGroup("router", block.router, _WHOLE),
        ParameterGroup("routed_experts", model.n_routed_experts * block.routed_expert, _EXPERTS, fp8=True),
        ParameterGroup("shared_experts", block.shared_experts, _WIDTHS, fp8=True),
    )


def stage_layers(model: ModelConfig, stages: int) -> list[Counter[LayerKind]]:
    """Returns how many layers of each kind every stage holds.

    Layers are dealt out in order, equally many per stage and the rest on the last, which also has the head and the MTP
    modules. (The report does not publish its split; this is the one of arXiv 2502.07846.)
    """
    per_stage = math.ceil(model.num_hidden_layers / stages)
    result: list[Counter[LayerKind]] = []
    for stage in range(stages):
        layers = range(stage * per_stage, min((stage + 1) * per_stage, model.num_hidden_layers))
        dense = sum(layer < model.num_dense_layers for layer in layers)
        result.append(Counter({"dense": dense, "moe": len(layers) - dense}))
    result[0]["embedding"] += 1
    result[-1]["head"] += 1
    result[-1]["mtp"] += model.num_nextn_predict_layers
    return [+counter for counter in result]


def rank_layers(model: ModelConfig, stages: int, *, dualpipe: bool) -> list[Counter[LayerKind]]:
    """Returns what every rank of the stage axis holds: its stage, and under DualPipe the opposite one too (3.2.1)."""
    held = stage_layers(model, stages)
    return [own + opposite for own, opposite in zip(held, reversed(held), strict=True)] if dualpipe else held


def copies_of_layers(config: PlanConfig) -> int:
    """Returns how many ranks of the stage axis hold the same layers."""
    return 2 if config.schedule == "dualpipe" else 1


def groups_of_rank(config: PlanConfig, layers: Counter[LayerKind]) -> list[tuple[ParameterGroup, int]]:
    """Returns the groups of parameters of a rank that holds these layers, each with the number of its layers."""
    return [(group, count) for kind, count in layers.items() for group in parameter_groups(config.model, kind)]


def state_memory(config: PlanConfig, layers: Counter[LayerKind]) -> StateMemory:
    """Returns the bytes of a rank that holds these layers: masters and moments are divided over replicas (ZeRO-1)."""
    formats = FORMATS[config.precision]
    parameters = divided = working = 0.0
    for group, count in groups_of_rank(config, layers):
        held = count * group.on_a_device(config.mesh)
        replicas = copies_of_layers(config) * group.replicas(config.mesh) if config.zero else 1
        parameters += held
        divided += held / replicas
        if replicas > 1:
            working += held * (formats.weight if group.fp8 else formats.compute)
    return StateMemory(
        parameters=parameters,
        masters=divided * WIDE,
        working_weights=working,
        gathered_weights=0.0,
        gradients=parameters * WIDE,
        moments=divided * 2 * formats.moment,
        average=0.0,
    )


# Activations ----------------------------------------------------------------------------------------------------


def kept_of_layer(config: PlanConfig, kind: LayerKind, policy: str) -> dict[str, float]:
    """Returns the bytes per token that a layer keeps under a policy ("none", "report" or "full"), by what they are."""
    if kind in ("embedding", "head"):
        return {}
    model, formats, tensor = config.model, FORMATS[config.precision], config.mesh.tensor
    d, width = model.hidden_size, formats.compute
    kept = {"layer input": d * width * (2 if kind == "mtp" else 1)}  # an MTP module also keeps what it joins
    if policy == "full":
        return kept
    heads = model.num_attention_heads / tensor
    latents = (model.q_lora_rank or 0) + model.kv_lora_rank + model.qk_rope_head_dim
    kept["attention latents"] = latents * width
    kept["attention core's output"] = heads * model.v_head_dim * formats.attention_output
    kept["attention's output"] = d * width
    rows = 0 if kind == "dense" else model.num_experts_per_tok
    widths = (
        model.intermediate_size if kind == "dense" else (rows + model.n_shared_experts) * model.moe_intermediate_size
    )
    kept["SwiGLU input"] = 2 * widths / tensor * formats.swiglu_input
    if rows:
        kept["router"] = model.n_routed_experts * WIDE
        kept["experts' output"] = rows * d * formats.compute  # for the gradients of the gates
    if policy == "none":
        # The norms' inputs in float32 and outputs, which are the linear maps' inputs, and the normed latents.
        kept["norms"] = (2 * d + latents) * (WIDE + formats.linear_input)
        kept["queries, keys, values"] = heads * (model.qk_head_dim + model.qk_nope_head_dim + model.v_head_dim) * width
        kept["experts' input"] = rows * d * formats.linear_input
        if config.precision != "fp8":
            kept["SwiGLU output"] = widths / tensor * formats.compute
    return kept


def micro_batches_in_flight(config: PlanConfig) -> float:
    """Returns the micro-batches whose activations a rank holds of each of its layers (report, table 2).

    1F1B and ZB1P hold PP of their stage; DualPipe PP + 1 of its two stages together.
    """
    stages = config.mesh.stage
    return (stages + 1) / 2 if config.schedule == "dualpipe" else min(stages, config.passes)


def activation_memory(config: PlanConfig, layers: Counter[LayerKind]) -> ActivationMemory:
    """Returns the activations of a rank that holds these layers, at the moment it holds most."""
    tokens, in_flight = config.tokens_per_pass, micro_batches_in_flight(config)
    kept: dict[str, float] = defaultdict(float)
    per_layer: dict[LayerKind, float] = {}
    for kind, count in layers.items():
        of_layer = kept_of_layer(config, kind, config.rematerialisation)
        if of_layer:
            per_layer[kind] = tokens * sum(of_layer.values())
        for name, size in of_layer.items():
            kept[name] += count * in_flight * tokens * size
    working = max(tokens * sum(kept_of_layer(config, kind, "none").values()) for kind in layers)
    vocabulary = config.model.vocab_size / config.mesh.tensor
    return ActivationMemory(
        kept=dict(kept),
        kept_per_layer=per_layer,
        micro_batches=in_flight,
        recomputed=working + attention_core_memory(config),
        loss=(layers["head"] > 0) * 3 * tokens * vocabulary * WIDE,  # logits, exponentials and gradient
    )
