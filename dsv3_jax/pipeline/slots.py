"""A pipeline schedule in lockstep, as tables of integers that a compiled loop can follow.

Ranks advance tick by tick; what one of them computes in a tick the next can use in the following one. Every value that
waits has a place of its own on its rank: activations that arrived, layer inputs kept for the backward pass, gradients
that arrived. Places are dealt out here, ahead of time, so that a rank has as many as the schedule ever needs at once.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import ConfigError
from dsv3_jax.pipeline.schedules import Chunk, Schedule, in_ticks
from dsv3_jax.pipeline.simulation import Durations

INPUT, WEIGHTS = 1, 2
"""Bits of `Lockstep.backward`: the gradient by the stage's input, and by its weights."""

_NONE = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lockstep:
    """What every rank does at every tick: int32 [ticks, ranks] each, -1 where there is nothing.

    Numpy arrays; inside the compiled loop, one rank's scalars at one tick.

    Attributes:
      forward: micro-batch whose forward pass is computed.   forward_direction, forward_stage: its own.
      forward_inbox: place of the stage's input among the activations that arrived; -1 on the first stage.
      forward_kept: place for the inputs of the stage's layers.
      forward_out: place among the arrived gradients for the stage's output: on the last stage, where no gradient
        arrives, the loss is computed from it in the backward pass.
      backward: which gradients are computed, bits INPUT and WEIGHTS; 0 for none.
      backward_micro_batch, backward_direction, backward_stage, backward_kept: as above.
      backward_inbox: place of the gradient by the stage's output (or, on the last stage, of that output).
      arriving_activation_up, _down: place for what the rank before (after) computed in this tick and sends up (down)
        the ranks; arriving_gradient_up, _down: the same of gradients.
    """

    forward: Any
    forward_direction: Any
    forward_stage: Any
    forward_inbox: Any
    forward_kept: Any
    forward_out: Any
    backward: Any
    backward_micro_batch: Any
    backward_direction: Any
    backward_stage: Any
    backward_kept: Any
    backward_inbox: Any
    arriving_activation_up: Any
    arriving_activation_down: Any
    arriving_gradient_up: Any
    arriving_gradient_down: Any


@dataclasses.dataclass(frozen=True)
class Places:
    """Places a rank needs at once, the most of any rank.

    Attributes:
      activations: arrived, waiting for their forward pass.
      kept: micro-batches whose layer inputs are kept, from the forward pass to the weights' gradient.
      gradients: arrived, waiting for the end of the backward pass.
    """

    activations: int
    kept: int
    gradients: int


def lockstep(schedule: Schedule) -> tuple[Lockstep, Places]:
    """The tables of a schedule, and the places they name."""
    ticks = in_ticks(schedule)
    shape = (len(ticks), schedule.ranks)
    tables = {field.name: np.full(shape, _NONE, np.int32) for field in dataclasses.fields(Lockstep)}
    tables["backward"][:] = 0
    when = {
        (rank, chunk): tick
        for tick, actions in enumerate(ticks)
        for rank, action in enumerate(actions)
        for chunk in action or ()
    }
    needed = [_deal_places(schedule, rank, when, tables) for rank in range(schedule.ranks)]
    for (rank, chunk), tick in when.items():
        direction = schedule.direction(chunk.micro_batch)
        if chunk.part == "F":
            tables["forward"][tick, rank] = chunk.micro_batch
            tables["forward_direction"][tick, rank] = direction
            tables["forward_stage"][tick, rank] = schedule.stage(rank, direction)
        else:
            tables["backward"][tick, rank] |= INPUT if chunk.part == "I" else WEIGHTS
            tables["backward_micro_batch"][tick, rank] = chunk.micro_batch
            tables["backward_direction"][tick, rank] = direction
            tables["backward_stage"][tick, rank] = schedule.stage(rank, direction)
    places = Places(*(max(counts) for counts in zip(*needed, strict=True)))
    return Lockstep(**tables), places


def _deal_places(
    schedule: Schedule, rank: int, when: dict[tuple[int, Chunk], int], tables: dict[str, np.ndarray]
) -> tuple[int, int, int]:
    """Writes one rank's places into the tables; how many there are of each kind."""
    activations, kept, gradients = [], [], []
    for m in range(schedule.micro_batches):
        direction = schedule.direction(m)
        stage = schedule.stage(rank, direction)
        onward = 1 if direction == 0 else -1
        forward, by_input, by_weights = (when[rank, Chunk(part, m)] for part in ("F", "I", "W"))
        if stage > 0:
            activations.append((when[rank - onward, Chunk("F", m)] + 1, forward, m))
        kept.append((forward, by_weights, m))
        last = stage == schedule.ranks - 1
        arrives = forward if last else when[rank + onward, Chunk("I", m)]
        gradients.append((arrives + 1, by_weights, m))
        assert arrives < by_input <= by_weights, "a gradient is used before it is there"
    counts = []
    for spans, name in ((activations, "activation"), (kept, "kept"), (gradients, "gradient")):
        places, count = _first_fit(spans)
        counts.append(count)
        for first, last, m in spans:
            way = "up" if (schedule.direction(m) == 0) == (name == "activation") else "down"
            if name == "activation":
                tables[f"arriving_activation_{way}"][first - 1, rank] = places[m]
                tables["forward_inbox"][last, rank] = places[m]
            elif name == "kept":
                tables["forward_kept"][first, rank] = places[m]
                for part in ("I", "W"):
                    tables["backward_kept"][when[rank, Chunk(part, m)], rank] = places[m]
            else:
                own = schedule.stage(rank, schedule.direction(m)) == schedule.ranks - 1
                tables["forward_out" if own else f"arriving_gradient_{way}"][first - 1, rank] = places[m]
                for part in ("I", "W"):
                    tables["backward_inbox"][when[rank, Chunk(part, m)], rank] = places[m]
    return counts[0], counts[1], counts[2]


def _first_fit(spans: Iterable[tuple[int, int, int]]) -> tuple[dict[int, int], int]:
    """A place for every (first tick, last tick, micro-batch), the lowest that is free; and how many there are.

    Dealt in the order of their starts, intervals need no more places than there are at once.
    """
    free_from: list[int] = []
    places = {}
    for first, last, m in sorted(spans):
        place = next((place for place, free in enumerate(free_from) if free <= first), len(free_from))
        if place == len(free_from):
            free_from.append(0)
        free_from[place] = last + 1
        places[m] = place
    return places, len(free_from)


def lockstep_time(schedule: Schedule, durations: Durations) -> float:
    """Time of a step where every tick takes as long as its longest action: what advancing together costs."""
    return sum(max(durations.of(action) for action in tick if action) for tick in in_ticks(schedule))


def moe_layers_of_stages(model: ModelConfig, stages: int) -> tuple[int, ...]:
    """How many MoE layers each stage holds: layers in order, equally many a stage and what is left on the last.

    The dense layers, which come first, all lie on the first stage; where they are more than its part, the MoE layers
    are dealt out over the others.

    Raises:
      ConfigError: several stages, and more of them than MoE layers.
    """
    moe, dense = model.num_moe_layers, model.num_dense_layers
    if stages > max(moe, 1):
        near = f"use {moe} or fewer" if moe else "it has none: use stage=1"
        raise ConfigError(
            f"mesh.stage ({stages}) must not exceed the model's {moe} MoE layers, which it divides; {near}"
        )
    a_stage = -(-model.num_hidden_layers // stages)
    if dense > a_stage:
        a_stage = -(-moe // (stages - 1))
        starts = [0] + [min(stage * a_stage, moe) for stage in range(stages)]
    else:
        starts = [min(max(stage * a_stage - dense, 0), moe) for stage in range(stages)] + [moe]
    return tuple(after - before for before, after in itertools.pairwise(starts))
