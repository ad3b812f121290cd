"""What the stages of a pipelined training step compute, and how long they wait for each other.

As `pipeline.stage` has it a MoE layer is computed forward once, and every part of a backward pass computes it
anew from its input: the gradient by the input alone costs one forward pass more, that by the weights always makes both.
Ranks advance in ticks, each of which takes as long as the rank that computes most in it.
"""

from __future__ import annotations

import functools

import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.counts import count_flops
from dsv3_jax.pipeline.facts import PARTS, ScheduleFacts, schedule_facts
from dsv3_jax.pipeline.slots import moe_layers_of_stages
from dsv3_jax.planning.activations import kept_of_layer
from dsv3_jax.planning.config import PlanConfig
from dsv3_jax.planning.forward_operations import attention_core, forward_operations
from dsv3_jax.planning.layers import LayerKind
from dsv3_jax.planning.stage_weights import directions_of

_FORWARD_PASSES, _BACKWARD_PASSES = 2, 6  # over memory: written and read; anew, and twice each for itself and gradient


def stage_operations(config: PlanConfig) -> tuple[float, float, float]:
    """Operations a token of a step: linear maps, attention core, head and router."""
    counts = _facts(config).of_stages / config.passes
    linear, attention, plain = np.einsum("sp,spw->w", counts, _costs(config))
    return float(linear), float(attention), float(plain)


def stage_memory_traffic(config: PlanConfig) -> tuple[float, float]:
    """Bytes a token of what a rank computes that is no product, on average; and how often they cross its memory."""
    model = config.model
    layers: dict[LayerKind, int] = {
        "dense": model.num_dense_layers,
        "moe": model.num_moe_layers,
        "mtp": model.num_nextn_predict_layers,
    }
    moved = sum(count * sum(kept_of_layer(config, kind, "none").values()) for kind, count in layers.items())
    backward = _facts(config).of_stages[:, 1:].sum() / config.passes / config.mesh.stage
    return moved / config.mesh.stage, _FORWARD_PASSES + _BACKWARD_PASSES * float(backward)


def idle_in_ticks(config: PlanConfig) -> float:
    """Idle time over busy time, of the average rank."""
    facts = _facts(config)
    return facts.seconds / float(_busy(config, facts).mean()) - 1


def waiting_ticks(config: PlanConfig) -> float:
    """How much longer a step takes than the rank computes that computes most: what is sent in a tick waits like it."""
    facts = _facts(config)
    return facts.seconds / float(_busy(config, facts).max())


def _busy(config: PlanConfig, facts: ScheduleFacts) -> np.ndarray:
    """Of every rank, in operations a token."""
    costs = _costs(config).sum(axis=2)
    busy = (facts.parts[:, 0] * costs).sum(axis=1)
    if directions_of(config) == 2:
        busy = busy + (facts.parts[:, 1] * costs[::-1]).sum(axis=1)
    return busy


def _facts(config: PlanConfig) -> ScheduleFacts:
    costs = _costs(config).sum(axis=2)
    return schedule_facts(config.schedule, config.mesh.stage, config.passes, tuple(map(tuple, costs.tolist())))


def _costs(config: PlanConfig) -> np.ndarray:
    """[stage, part of PARTS, what]: operations a token; of linear maps, of the attention core, of head and router."""
    return _of_parts(config.model, config.mesh.stage, config.sequence_length, config.rematerialisation)


@functools.lru_cache(maxsize=64)
def _of_parts(model: ModelConfig, stages: int, length: int, rematerialisation: str) -> np.ndarray:
    layers = np.array(moe_layers_of_stages(model, stages))
    counts = count_flops(model, length)
    core = attention_core(model, length)
    # A layer's linear maps, attention core and router, forward.
    either = np.array([counts.terms["attention_projections"], counts.terms["attention_core"] * core.computed, 0])
    either /= model.num_hidden_layers
    routed = counts.terms["routed_experts"] + counts.terms["shared_experts"]
    moe = either + np.array([routed, 0, counts.terms["router"]]) / model.num_moe_layers
    dense = model.num_dense_layers * either + np.array([counts.terms["dense_feed_forward"], 0, 0])
    _, _, plain = forward_operations(model, length)
    last = model.num_nextn_predict_layers * moe
    last[2] = plain - counts.terms["router"]  # heads, projections and routers of the MTP modules with the head
    backward = np.array([2, core.backward, 2])
    again = rematerialisation != "none"  # first and last stage's own blocks keep what the policy says
    anew = np.array([rematerialisation == "full", again, 0], float)

    parts = dict.fromkeys(PARTS, np.zeros((len(layers), 3)))
    of_layers = layers[:, None] * moe
    first, end = (np.arange(len(layers))[:, None] == stage for stage in (0, len(layers) - 1))
    parts["F"] = of_layers + first * dense
    by_weights = of_layers * (1 + backward) + first * dense * (1 + backward + anew)
    by_loss = end * last * (1 + backward + anew)
    # The first stage hands its input's gradient to no one.
    parts["I"] = ~first * of_layers * (1 + np.array([1, core.backward, 1])) + by_loss
    parts["W"] = by_weights
    parts["IW"] = by_weights + by_loss
    return np.stack([parts[part] for part in PARTS], axis=1)
