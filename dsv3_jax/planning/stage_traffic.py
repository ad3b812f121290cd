"""Bytes a device sends in a training step with pipeline stages, by mesh axis (`pipeline.passes`).

What layers need is sent in every tick that computes them: forward once, and in each part of a backward pass anew. What
belongs to weights goes once a step: out to the stages, and gradients back, where they are summed over replicas.
"""

from __future__ import annotations

import math
from collections import defaultdict

from dsv3_jax.pipeline.facts import PARTS, ScheduleFacts, schedule_facts
from dsv3_jax.pipeline.slots import moe_layers_of_stages
from dsv3_jax.planning.config import PlanConfig
from dsv3_jax.planning.layers import LayerKind, parameter_groups
from dsv3_jax.planning.precision_bytes import width_of
from dsv3_jax.planning.stage_step import message_bytes
from dsv3_jax.planning.stage_weights import stage_weights
from dsv3_jax.planning.state_memory import gathered_width
from dsv3_jax.planning.traffic import (
    GRADIENTS_SUMMED,
    HIDDEN_STATES,
    REPLICAS,
    TENSOR_SUMS,
    TOKENS,
    WEIGHTS_GATHERED,
    Traffic,
    flow_over,
    tokens_over_hops,
)

STAGE_WEIGHTS = "weights to stages, gradients back"
OPPOSITE_WEIGHTS = "opposite stages' weights, gradients"
IN_TICKS = {TOKENS, WEIGHTS_GATHERED, GRADIENTS_SUMMED, TENSOR_SUMS}
"""What is sent while a rank computes, so that the others wait for it."""


def stage_traffic(config: PlanConfig) -> tuple[int, list[Traffic]]:
    """The rank of the stage axis that sends longest, and what it sends."""
    facts = schedule_facts(config.schedule, config.mesh.stage, config.passes)
    alike = config.mesh.stage // facts.parts.shape[1]  # with two directions the other half mirrors the first
    of_ranks = [_in_ticks(config, facts, rank) for rank in range(alike)]
    busiest = max(range(alike), key=lambda rank: sum(flow.seconds for flow in of_ranks[rank]))
    found = [*of_ranks[busiest], *_once(config), _handed_on(config, facts)]
    return busiest, [flow for flow in found if flow.sent]


def _handed_on(config: PlanConfig, facts: ScheduleFacts) -> Traffic:
    """In every tick, whether there is anything or not."""
    return flow_over(config, "stage", HIDDEN_STATES, facts.ticks * facts.ways * message_bytes(config))


def _in_ticks(config: PlanConfig, facts: ScheduleFacts, rank: int) -> list[Traffic]:
    """Of one rank's layers: experts' exchange, FSDP's gathers and sums, tensor parallelism's sums."""
    forward, backward, by_weights = _layer_runs(config, facts, rank)
    flows: list[Traffic] = []
    if config.mesh.expert > 1:
        runs = [sum(runs[kind] for kind in ("moe", "mtp")) * config.tokens_a_pass for runs in (forward, backward)]
        flows.append(tokens_over_hops(config, *runs))
    if config.mesh.fsdp > 1:
        others = config.mesh.fsdp - 1
        weights = gradients = 0.0
        for kind in forward:
            for group in parameter_groups(config.model, kind):
                if "fsdp" in group.axes:
                    part = group.on_a_device(config.mesh) * others
                    weights += part * (forward[kind] + backward[kind]) * gathered_width(config, group)
                    gradients += part * by_weights[kind] * width_of(config.master_dtype)
        flows.append(flow_over(config, "fsdp", WEIGHTS_GATHERED, weights))
        flows.append(flow_over(config, "fsdp", GRADIENTS_SUMMED, gradients))
    if config.mesh.tensor > 1:
        # Behind attention and feed-forward: forward, and in a backward part anew and for the gradients.
        sums = sum(2 * forward[kind] + 4 * backward[kind] for kind in ("dense", "moe", "mtp"))
        sent = sums * 2 * (1 - 1 / config.mesh.tensor) * message_bytes(config)
        flows.append(flow_over(config, "tensor", TENSOR_SUMS, sent))
    return flows


def _layer_runs(config: PlanConfig, facts: ScheduleFacts, rank: int) -> tuple[dict[LayerKind, float], ...]:
    """How often a rank computes a layer of each kind forward, backward, and for its weights' gradients."""
    model, layers = config.model, moe_layers_of_stages(config.model, config.mesh.stage)
    forward, backward, by_weights = (defaultdict[LayerKind, float](float) for _ in range(3))
    for direction in range(facts.parts.shape[1]):
        stage = facts.stage(rank, direction)
        parts = dict(zip(PARTS, facts.parts[rank, direction].tolist(), strict=True))
        weights = parts["W"] + parts["IW"]
        forward["moe"] += parts["F"] * layers[stage]
        # The first stage hands its input's gradient to no one, and does not make it alone.
        backward["moe"] += (weights + (parts["I"] if stage else 0)) * layers[stage]
        by_weights["moe"] += weights * layers[stage]
        own: dict[LayerKind, int] = {}
        if stage == 0:
            own = {"dense": model.num_dense_layers}
        elif stage == len(layers) - 1:
            own = {"mtp": model.num_nextn_predict_layers, "head": 1}
        for kind, count in own.items():
            forward[kind] += count * parts["F"]
            by_weights[kind] += count * parts["F"]
            backward[kind] += count * parts["F"] * (kind != "head")  # one pass, for all depths, with its gradient
    return forward, backward, by_weights


def _once(config: PlanConfig) -> list[Traffic]:
    """Weights to where they are used, gradients to where the moments lie, and the new weights back to all replicas."""
    mesh, master = config.mesh, width_of(config.master_dtype)
    others = 1 - 1 / mesh.stage
    exchanged = opposite = 0.0
    replicas: dict[str, float] = defaultdict(float)
    for weight in stage_weights(config):
        own = (weight.in_stage - weight.opposite) * master
        if weight.kind != "moe":
            exchanged += 2 * others * own  # gathered, or left whole and summed by an all-reduce
        elif weight.cut is None:  # every rank has all of it, and of its gradient too
            exchanged += others * own * mesh.stage
        elif weight.cut != 0:
            exchanged += 2 * others * own
        opposite += 2 * weight.opposite * master
        count = math.prod(mesh.sizes[axis] for axis in weight.replicas)
        # Of a sum over all replicas there are two halves; ZeRO's new weights come back once more.
        part = weight.in_state * master * (1 - 1 / count)
        axis = next((axis for axis in weight.replicas if mesh.sizes[axis] > 1), "data")
        replicas[axis] += part * (2 + config.zero)
    flows = [
        flow_over(config, "stage", STAGE_WEIGHTS, exchanged),
        flow_over(config, "stage", OPPOSITE_WEIGHTS, opposite),
    ]
    return flows + [flow_over(config, axis, REPLICAS, sent) for axis, sent in replicas.items()]
