"""Bytes a device holds in a training step with pipeline stages (`pipeline.passes`, report section 3.2.1).

Every rank of the stage axis runs the same program and has the same room: places for as many MoE layers as the fullest
stage has, with DualPipe twice, and all that is not a MoE layer. Only inputs of layers are kept; layers are computed
anew one at a time, first and last stage's own parts in one piece each.
"""

from __future__ import annotations

from collections import Counter

from dsv3_jax.pipeline.facts import schedule_facts
from dsv3_jax.pipeline.slots import moe_layers_of_stages
from dsv3_jax.planning.activations import (
    ActivationMemory,
    attention_core_memory,
    exchange_buffers,
    kept_of_layer,
)
from dsv3_jax.planning.config import PlanConfig
from dsv3_jax.planning.layers import LayerKind
from dsv3_jax.planning.precision_bytes import width_of
from dsv3_jax.planning.stage_weights import directions_of, stage_weights
from dsv3_jax.planning.state_memory import StateMemory, gathered_layer


def stage_rank_layers(config: PlanConfig) -> Counter[LayerKind]:
    """What every rank of the stage axis has room for while the step runs."""
    model = config.model
    held: Counter[LayerKind] = Counter({"embedding": 1, "dense": model.num_dense_layers, "head": 1})
    held["moe"] = places_of_stage(config) * directions_of(config)
    held["mtp"] = model.num_nextn_predict_layers
    return +held


def places_of_stage(config: PlanConfig) -> int:
    """For MoE layers, of one stage."""
    return max(moe_layers_of_stages(config.model, config.mesh.stage))


def stage_state_memory(config: PlanConfig) -> StateMemory:
    """Of any rank. Working copies and the gradients that are added up have the dtype of the masters."""
    weights, master = stage_weights(config), width_of(config.master_dtype)
    masters = sum(weight.in_state for weight in weights) * master
    working = sum(weight.in_stage for weight in weights)
    average = masters if config.average != "none" else 0.0
    return StateMemory(
        parameters=working,
        masters=masters,
        working_weights=working * master,
        gathered_weights=0.0,  # beside the activations of the part of a stage that is computed
        gradients=working * master,
        moments=sum(weight.moment for weight in weights) * 2 * config.moment_width,
        average=average if config.average == "device" else 0.0,
        host_average=average if config.average == "host" else 0.0,
    )


def stage_activation_memory(config: PlanConfig) -> ActivationMemory:
    """Of any rank."""
    facts = schedule_facts(config.schedule, config.mesh.stage, config.passes)
    hidden = message_bytes(config)
    return ActivationMemory(
        kept={
            "layer input": facts.kept * places_of_stage(config) * hidden,
            "arrived from other stages": (facts.activations + facts.gradients) * hidden,
        },
        kept_a_layer={"moe": hidden},
        micro_batches=facts.kept,
        recomputed=max(_moe_layer(config), _first_stage(config)),
        loss=_last_stage(config),
    )


def message_bytes(config: PlanConfig) -> float:
    """Hidden states of a micro-batch, whole on every rank of the tensor axis."""
    return config.tokens_a_pass * config.model.hidden_size * config.formats.compute


def _weights_of(config: PlanConfig, kind: LayerKind) -> float:
    """Bytes of all weights of a kind that a rank works with, or of their gradients."""
    total = sum(weight.in_stage for weight in stage_weights(config) if weight.kind == kind)
    return total * width_of(config.master_dtype)


def _gathered(config: PlanConfig, kind: LayerKind) -> float:
    """One layer put together from its FSDP shards, and its gradients before they are summed into these."""
    return gathered_layer(config, kind, ahead=0) if config.mesh.fsdp > 1 else 0.0


def _kept(config: PlanConfig, kind: LayerKind, policy: str) -> float:
    return config.tokens_a_pass * sum(kept_of_layer(config, kind, policy).values())


def _moe_layer(config: PlanConfig) -> float:
    """One layer's backward pass: its weights taken from their stack, and their gradients before they are added."""
    weights = _weights_of(config, "moe") / (places_of_stage(config) * directions_of(config))
    working = _kept(config, "moe", "none") + attention_core_memory(config) + exchange_buffers(config)
    return 2 * weights + _gathered(config, "moe") + working


def _first_stage(config: PlanConfig) -> float:
    """The backward pass of the dense layers, whose gradients are put together before they are added."""
    dense = config.model.num_dense_layers
    if not dense:
        return 0.0
    kept = dense * _kept(config, "dense", config.rematerialisation)
    working = _kept(config, "dense", "none") + attention_core_memory(config)
    return _weights_of(config, "dense") + _gathered(config, "dense") + kept + working


def _last_stage(config: PlanConfig) -> float:
    """Logits of every depth in float32; the output head as it is multiplied, and its gradient; what MTP blocks keep.

    Where the head is cut over the fsdp axis its gradient is summed from whole ones in float32.
    """
    model, depths = config.model, config.model.num_nextn_predict_layers
    logits = (1 + depths) * config.tokens_a_pass * model.vocab_size / config.mesh.tensor * 4
    head = model.vocab_size * model.hidden_size / config.mesh.tensor
    copies = 2 * config.formats.compute + (width_of(config.master_dtype) if config.mesh.fsdp > 1 else 0)
    return logits + copies * head + depths * _kept(config, "mtp", config.rematerialisation)
