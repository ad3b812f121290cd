"""A model as the layers a pipeline stage is made of, each as groups of parameters that meshes split alike."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import Literal

from dsv3_jax.config import ModelConfig
from dsv3_jax.counts import count_parameters
from dsv3_jax.sharding.mesh import MeshConfig

LayerKind = Literal["embedding", "dense", "moe", "mtp", "head"]


@dataclasses.dataclass(frozen=True)
class ParameterGroup:
    """Parameters that are split over the same axes.

    Attributes:
      name: what they are.
      elements: how many, unsplit.
      axes: mesh axes that split them; over all others they are replicated.
      fp8: whether the FP8 recipe multiplies with them in FP8.
    """

    name: str
    elements: int
    axes: tuple[str, ...]
    fp8: bool = False

    def on_a_device(self, mesh: MeshConfig) -> float:
        """Elements a device holds."""
        return self.elements / math.prod(getattr(mesh, axis) for axis in self.axes)

    def replicas(self, mesh: MeshConfig) -> int:
        """Devices of one stage that hold the same elements."""
        axes = {"data", "fsdp", "expert", "tensor"} - set(self.axes)
        return math.prod(getattr(mesh, axis) for axis in axes)


_WHOLE = ()
_MATRIX = ("fsdp",)  # latents, router: nothing for the tensor axis to divide without a sum behind it
_WIDE = ("fsdp", "tensor")  # heads, feed-forward widths, vocabulary
_EXPERTS = ("fsdp", "expert", "tensor")


def parameter_groups(model: ModelConfig, kind: LayerKind) -> tuple[ParameterGroup, ...]:
    """The groups of one layer of this kind; "mtp" is a whole MTP module without what it shares."""
    d = model.hidden_size
    if kind == "embedding":
        return (ParameterGroup("embedding", model.vocab_size * d, _WIDE),)
    if kind == "head":
        return (ParameterGroup("head", model.vocab_size * d, _WIDE), ParameterGroup("norms", d, _WHOLE))
    if kind == "mtp":
        joining = (ParameterGroup("mtp_projection", 2 * d * d, _MATRIX), ParameterGroup("norms", 3 * d, _WHOLE))
        return (*joining, *parameter_groups(model, "moe"))
    block = count_parameters(model).block
    q_rank, kv_rank = model.q_lora_rank or 0, model.kv_lora_rank
    latents = d * (q_rank + kv_rank + model.qk_rope_head_dim)
    attention = (
        ParameterGroup("norms", 2 * d + q_rank + kv_rank, _WHOLE),
        ParameterGroup("attention_latents", latents, _MATRIX, fp8=True),
        ParameterGroup("attention_heads", block.attention - latents - q_rank - kv_rank, _WIDE, fp8=True),
    )
    if kind == "dense":
        return (*attention, ParameterGroup("dense_feed_forward", block.dense_feed_forward, _WIDE, fp8=True))
    experts = model.n_routed_experts * block.routed_expert
    moe = [
        ParameterGroup("router", block.router, _MATRIX),
        ParameterGroup("routed_experts", experts, _EXPERTS, fp8=True),
    ]
    if block.shared_experts:
        moe.append(ParameterGroup("shared_experts", block.shared_experts, _WIDE, fp8=True))
    return (*attention, *moe)


def stage_layers(model: ModelConfig, stages: int) -> list[Counter[LayerKind]]:
    """How many layers of each kind every stage holds.

    Layers are dealt out in order, equally many a stage and what is left on the last, which also has the head and the
    MTP modules. (The report does not publish its split; this is the memory analysis paper's.)
    """
    a_stage = math.ceil(model.num_hidden_layers / stages)
    result: list[Counter[LayerKind]] = []
    for stage in range(stages):
        layers = range(stage * a_stage, min((stage + 1) * a_stage, model.num_hidden_layers))
        dense = sum(layer < model.num_dense_layers for layer in layers)
        result.append(Counter({"dense": dense, "moe": len(layers) - dense}))
    result[0]["embedding"] += 1
    result[-1]["head"] += 1
    result[-1]["mtp"] += model.num_nextn_predict_layers
    return [+counter for counter in result]


def rank_layers(model: ModelConfig, stages: int, *, dualpipe: bool) -> list[Counter[LayerKind]]:
    """What every rank of the stage axis holds: its stage, and under DualPipe also the one opposite (section 3.2.1)."""
    held = stage_layers(model, stages)
    return [own + opposite for own, opposite in zip(held, reversed(held), strict=True)] if dualpipe else held
