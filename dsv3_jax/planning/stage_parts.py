"""Counts what the stages of a pipelined step compute, how often, and how long they wait for each other.

As `pipeline.stage` runs it, a layer is computed forward once, and every part of a backward pass computes again what the
rematerialisation policy does not keep. Where the gradients by input and by weights are computed apart, the second also
computes the first again. Ranks advance in ticks, each of which takes as long as the rank that computes most in it. A
tick in which a last stage computes losses begins with its MTP modules, for which all ranks wait, and the head, of which
each rank has some rows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict

import numpy as np
from jaxtyping import Float

from dsv3_jax.config import ModelConfig
from dsv3_jax.counts import count_flops
from dsv3_jax.pipeline.facts import PARTS, ScheduleFacts, schedule_facts
from dsv3_jax.pipeline.slots import moe_layers_of_stages
from dsv3_jax.planning.attention_form import CoreOperations, attention_core, attention_form, keeps_core
from dsv3_jax.planning.config import PlanConfig
from dsv3_jax.planning.forward_operations import Recomputed, forward_operations, recomputed_operations
from dsv3_jax.planning.weights import LayerKind, layers_of_rank, stages_per_rank


@dataclasses.dataclass(frozen=True)
class LayerRuns:
    """How often a rank computes a layer of each kind in a step: forward, backward, and gradients of its weights."""

    forward: dict[LayerKind, float]
    backward: dict[LayerKind, float]
    by_weights: dict[LayerKind, float]


def layer_runs(config: PlanConfig) -> list[LayerRuns]:
    """Returns the runs of every rank of the stage axis that differs from those before it."""
    if not config.has_stages:
        layers = layers_of_rank(config)
        runs: dict[LayerKind, float] = {kind: float(count * config.passes) for kind, count in layers.items()}
        return [LayerRuns(runs, runs, runs)]
    facts = schedule_facts(config.schedule, config.mesh.stage, config.passes)
    different = config.mesh.stage // facts.parts.shape[1]  # with two directions the other half mirrors the first
    return [_runs_of_rank(config, facts, rank) for rank in range(different)]


def _runs_of_rank(config: PlanConfig, facts: ScheduleFacts, rank: int) -> LayerRuns:
    model, layers = config.model, moe_layers_of_stages(config.model, config.mesh.stage)
    forward, backward, by_weights = (defaultdict[LayerKind, float](float) for _ in range(3))
    for direction in range(facts.parts.shape[1]):
        stage = facts.stage(rank, direction)
        parts = dict(zip(PARTS, facts.parts[rank, direction].tolist(), strict=True))
        weights = parts["W"] + parts["IW"]
        forward["moe"] += parts["F"] * layers[stage]
        # The first stage sends its input's gradient to no one, and does not compute it alone.
        backward["moe"] += (weights + (parts["I"] if stage else 0)) * layers[stage]
        by_weights["moe"] += weights * layers[stage]
        own: dict[LayerKind, int] = {}
        if stage == 0:
            own = {"dense": model.num_dense_layers}
        elif stage == len(layers) - 1:
            own = {"mtp": model.num_nextn_predict_layers}
        for kind, count in own.items():
            for runs in (forward, backward, by_weights):
                runs[kind] += count * parts["F"]
    # Of the head every rank has a part. Its forward pass, one for all depths, is followed by its gradient at once.
    forward["head"] = by_weights["head"] = facts.predictions / config.mesh.stage
    return LayerRuns(forward, backward, by_weights)


def operations_per_token(config: PlanConfig) -> tuple[float, float, float]:
    """Returns operations per token of a step: linear maps, attention core, and output head with router."""
    facts = _facts(config)
    costs, mtp = _costs(config)
    linear, attention, plain = np.einsum("sp,spw->w", facts.of_stages / config.passes, costs) + mtp
    heads = facts.predictions * config.mesh.stage / config.passes * _part_of_head(config)
    return float(linear), float(attention), float(plain + heads)


def backward_parts(config: PlanConfig) -> float:
    """Returns how often a micro-batch's layers are computed in backward parts, on average over the stages."""
    return float(_facts(config).of_stages[:, 1:].sum() / config.passes / config.mesh.stage)


def bubble(config: PlanConfig) -> float:
    """Returns idle time over computing time of the average rank."""
    facts = _facts(config)
    return facts.seconds / float(_busy(config, facts).mean()) - 1


def waiting(config: PlanConfig) -> float:
    """Returns the time of the step over the computing time of the busiest rank.

    What is sent in a tick takes longer by the same factor, since the other ranks wait for it too.
    """
    facts = _facts(config)
    return facts.seconds / float(_busy(config, facts).max())


def _busy(config: PlanConfig, facts: ScheduleFacts) -> Float[np.ndarray, " stages"]:
    """Returns operations per token of every rank."""
    costs, mtp = _costs(config)
    of_stages = costs.sum(axis=2)
    busy = (facts.parts[:, 0] * of_stages).sum(axis=1) + facts.predictions * _part_of_head(config)
    busy[-1] += facts.parts[-1, 0, 0] * mtp.sum()
    if stages_per_rank(config) == 2:
        busy += (facts.parts[:, 1] * of_stages[::-1]).sum(axis=1)
        busy[0] += facts.parts[0, 1, 0] * mtp.sum()
    return busy


def _facts(config: PlanConfig) -> ScheduleFacts:
    costs, mtp = _costs(config)
    rows = tuple(map(tuple, costs.sum(axis=2).tolist()))
    prediction = float(mtp.sum()) + _part_of_head(config)
    return schedule_facts(config.schedule, config.mesh.stage, config.passes, rows, prediction)


def _part_of_head(config: PlanConfig) -> float:
    """Returns operations per token of a stage's rows of the head, for all directions, in a tick with predictions."""
    model = config.model
    heads = (1 + model.num_nextn_predict_layers) * count_flops(model, config.sequence_length).terms["head"]
    return 3 * heads * stages_per_rank(config) / config.mesh.stage


def _costs(config: PlanConfig) -> tuple[Float[np.ndarray, "stages parts 3"], Float[np.ndarray, "3"]]:
    core = attention_core(config.model, config.sequence_length, attention_form(config))
    fp8 = config.recipe.fp8 is not None
    again = recomputed_operations(
        config.model, config.rematerialisation, on_mesh=True, fp8=fp8, keeps_core=keeps_core(config)
    )
    return _costs_of(config.model, config.mesh.stage, config.sequence_length, core, again)


@functools.lru_cache(maxsize=64)
def _costs_of(
    model: ModelConfig, stages: int, length: int, core: CoreOperations, again: Recomputed
) -> tuple[Float[np.ndarray, "stages parts 3"], Float[np.ndarray, "3"]]:
    """Returns operations per token of every stage and part of PARTS, and of the MTP modules' forward pass.

    The last axis is linear maps, attention core, and router with the MTP modules' projection. The head is left out.
    """
    layers = np.array(moe_layers_of_stages(model, stages))
    counts = count_flops(model, length)
    either = np.array([counts.terms["attention_projections"], counts.terms["attention_core"] * core.computed, 0])
    either /= model.num_hidden_layers
    routed = counts.terms["routed_experts"] + counts.terms["shared_experts"]
    moe = either + np.array([routed, 0, counts.terms["router"]]) / model.num_moe_layers
    dense = either + np.array([counts.terms["dense_feed_forward"], 0, 0]) / max(model.num_dense_layers, 1)
    _, _, plain = forward_operations(model, length)
    last = model.num_nextn_predict_layers * moe
    heads = (1 + model.num_nextn_predict_layers) * counts.terms["head"]
    last[2] = plain - counts.terms["router"] - heads  # projections and routers of the MTP modules
    cores = np.array([0, again.core, 0]) * either
    again_dense = cores + np.array([again.attention + again.dense, 0, 0])
    again_moe = cores + np.array([again.attention + again.experts, 0, again.router])
    both, by_input = np.array([2, core.backward, 2]), np.array([1, core.backward, 1])

    of_layers = layers[:, None]
    first, end = (np.arange(len(layers))[:, None] == stage for stage in (0, len(layers) - 1))
    by_weights = of_layers * (moe * both + again_moe)
    by_weights += first * model.num_dense_layers * (dense * both + again_dense)
    by_loss = end * (last * both + model.num_nextn_predict_layers * again_moe)
    parts = {
        "F": of_layers * moe + first * model.num_dense_layers * dense,
        # The first stage sends its input's gradient to no one.
        "I": ~first * of_layers * (moe * by_input + again_moe) + by_loss,
        "W": by_weights,
        "IW": by_weights + by_loss,
    }
    return np.stack([parts[part] for part in PARTS], axis=1), last
