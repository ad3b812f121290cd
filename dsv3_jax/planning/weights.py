"""Derives where a training step keeps weights and optimizer state from the abstract model and the sharding rules.

Pipelined steps are described in `pipeline.weights`: the state shards every weight over the stages too, and a step
begins with an exchange after which each rank has all layers of its own stage, or of its two stages under DualPipe, and
its part of the embedding and of the output head. The blocks of the MTP modules are in layer slots of the last stage.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from typing import Literal

import jax
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec

from dsv3_jax.config import ModelConfig
from dsv3_jax.model import DeepSeekV3, abstract_model
from dsv3_jax.pipeline.slots import layer_slots, moe_layers_of_stages
from dsv3_jax.pipeline.weights import Share, rows_of_stages, share_of, working_formats
from dsv3_jax.planning.config import PlanConfig
from dsv3_jax.precision import Precision
from dsv3_jax.sharding.mesh import MeshConfig
from dsv3_jax.sharding.ranks import axes_of
from dsv3_jax.sharding.rules import BATCH_AXES, CONTEXT, parameter_specs, rules_over_stages
from dsv3_jax.training.config import Optimizer
from dsv3_jax.training.muon import hidden_matrices, parameter_name

LayerKind = Literal["embedding", "dense", "moe", "mtp", "head"]
KINDS: dict[str, LayerKind] = {
    "embedding": "embedding",
    "dense_blocks": "dense",
    "moe_blocks": "moe",
    "mtp": "mtp",
    "final_norm": "head",
    "head": "head",
}
"""The kind of layer that each branch of the parameter tree belongs to."""

_STAGE = "stage"


@dataclasses.dataclass(frozen=True)
class Weight:
    """One array of the parameter tree with all its stacked layers, in elements on one device.

    Attributes:
      kind: the kind of layer it belongs to.
      itemsize: bytes per element of the master weight, and of its gradient.
      working: bytes per element of the weight that the step computes with, scales of FP8 included.
      in_state: elements of the master weight.
      moments: elements of the optimizer's moments together: both of Adam's, or Muon's one.
      exchanged: elements that a rank gets at the beginning of a pipelined step, its own shard included.
      in_step: elements that the rank has memory for while the step runs, and for their gradients. None of a block of an
        MTP module in a pipeline, whose memory is a layer slot.
      opposite: those of `in_step` that DualPipe's second stage adds, which come from the opposite rank.
      share: what a stage holds of it while the step runs.
      stage_dimension: the dimension that the state shards over the stages; None where every stage has all.
      replicas: axes of the tokens whose ranks hold the same elements.
    """

    kind: LayerKind
    itemsize: int
    working: float
    in_state: float
    moments: float
    exchanged: float
    in_step: float
    opposite: float
    share: Share
    stage_dimension: int | None
    replicas: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class StateMemory:
    """The bytes of weights, gradients and optimizer state on one device.

    Attributes:
      parameters: elements whose gradients this device computes.
      masters: what the optimizer updates.
      working_weights: in a pipelined step, the copy of the stage's weights that it computes with.
      gathered_weights: weights and gradients of a layer while its FSDP shards are all-gathered.
      gradients: the accumulated gradients.
      moments: the optimizer's.
      average: the running average of the weights.
    """

    parameters: float
    masters: float
    working_weights: float
    gathered_weights: float
    gradients: float
    moments: float
    average: float

    @property
    def total(self) -> float:
        """All bytes of the state, its gradients and copies of weights."""
        return (
            self.masters + self.working_weights + self.gathered_weights + self.gradients + self.moments + self.average
        )


def stages_per_rank(config: PlanConfig) -> int:
    """Returns how many stages' layers a rank of the stage axis holds: two under DualPipe."""
    return 2 if config.has_stages and config.schedule == "dualpipe" else 1


def layers_of_rank(config: PlanConfig) -> Counter[LayerKind]:
    """Returns how many layers of each kind every rank of the stage axis has memory for while the step runs.

    In a pipeline the MTP modules' are among those of kind "moe".
    """
    model, depths = config.model, config.model.num_nextn_predict_layers
    held: Counter[LayerKind] = Counter({"dense": model.num_dense_layers})
    if config.has_stages:
        held["moe"] = layer_slots(moe_layers_of_stages(model, config.mesh.stage), depths) * stages_per_rank(config)
    else:
        held |= Counter({"embedding": 1, "head": 1, "moe": model.num_moe_layers, "mtp": depths})
    return +held


def state_memory(config: PlanConfig, gathered: float) -> StateMemory:
    """Returns the bytes of the state on any device; `gathered` are those of layers being all-gathered."""
    weights = weights_of(config)
    masters = sum(weight.in_state * weight.itemsize for weight in weights)
    working = sum(weight.in_step * weight.working for weight in weights)
    return StateMemory(
        parameters=sum(weight.in_step for weight in weights),
        masters=masters,
        working_weights=working if config.has_stages else 0.0,
        gathered_weights=gathered,
        gradients=sum(weight.in_step * weight.itemsize for weight in weights),
        moments=sum(weight.moments for weight in weights) * moment_bytes(config),
        average=masters if config.average == "device" else 0.0,
    )


def moment_bytes(config: PlanConfig) -> int:
    """Returns the bytes per element of the optimizer's moments."""
    return jax.numpy.dtype(config.run.moment_dtype).itemsize


def weights_of(config: PlanConfig) -> tuple[Weight, ...]:
    """Returns every array of the parameter tree."""
    return _weights(config.model, config.mesh, stages_per_rank(config), config.zero, config.optimizer, config.recipe)


@functools.lru_cache(maxsize=4)
def _abstract(model: ModelConfig, precision: Precision) -> DeepSeekV3:
    return abstract_model(model, precision=precision)


@functools.lru_cache(maxsize=4096)
def _weights(
    model: ModelConfig,
    mesh: MeshConfig,
    stages_held: int,
    zero: bool,
    optimizer: Optimizer,
    precision: Precision,
) -> tuple[Weight, ...]:
    module = _abstract(model, precision)
    tree = nnx.state(module, nnx.Param)
    of_muon = hidden_matrices(model) if optimizer == "muon" else {}
    layers = moe_layers_of_stages(model, mesh.stage) if mesh.stage > 1 else ()
    abstract = abstract_mesh(mesh)
    formats = working_formats(module, abstract) if layers else {}
    shapes = jax.tree_util.tree_leaves_with_path(tree)
    specs = _leaves(parameter_specs(tree, abstract, rules_over_stages(layers)))
    moments = _leaves(parameter_specs(tree, abstract, rules_over_stages(layers, zero=True))) if zero else specs
    found = []
    for (path, leaf), spec, moment in zip(shapes, specs, moments, strict=True):
        names = tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        kind = KINDS[names[0]]
        elements = math.prod(leaf.shape)
        share = share_of(names) if layers else "whole"
        exchanged, opposite = elements / _shards(spec, mesh, leave_out=_STAGE if share != "columns" else ""), 0.0
        if share == "layers":
            exchanged *= max(layers) / model.num_moe_layers
        elif share == "rows":
            exchanged *= max(rows_of_stages(model.vocab_size, abstract)) / model.vocab_size
        in_step = 0.0 if share == "last" else exchanged
        if share == "layers":
            in_step *= layer_slots(layers, model.num_nextn_predict_layers) / max(layers)
            opposite = in_step * (stages_held - 1)
        axes = [axes_of(entry) for entry in spec]
        found.append(
            Weight(
                kind=kind,
                itemsize=leaf.dtype.itemsize,
                working=formats[names].bytes if names in formats else leaf.dtype.itemsize,
                in_state=elements / _shards(spec, mesh),
                moments=(1 if parameter_name(names) in of_muon else 2) * elements / _shards(moment, mesh),
                exchanged=exchanged,
                in_step=in_step + opposite,
                opposite=opposite,
                share=share,
                stage_dimension=next((dim for dim, names in enumerate(axes) if _STAGE in names), None),
                replicas=tuple(axis for axis in (*BATCH_AXES, CONTEXT) if all(axis not in names for names in axes)),
            )
        )
    return tuple(found)


@functools.lru_cache(maxsize=4096)
def abstract_mesh(mesh: MeshConfig) -> AbstractMesh:
    """Returns the mesh without devices, for the sharding rules."""
    return AbstractMesh(tuple(mesh.sizes.values()), tuple(mesh.sizes))


def _leaves(specs: nnx.State) -> list[PartitionSpec]:
    return jax.tree.leaves(specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))


def _shards(spec: PartitionSpec, mesh: MeshConfig, leave_out: str = "") -> int:
    """Returns the number of shards that a spec cuts an array into, without those along one axis."""
    return math.prod(mesh.sizes[axis] for entry in spec for axis in axes_of(entry) if axis != leave_out)
