"""What a pipeline schedule asks of its ranks when they advance in lockstep, as the training step runs it.

Counted from the schedule's programs, as `pipeline.slots.lockstep` does to fill its tables, without these. A
schedule of many micro-batches repeats itself between its two ends: it is counted from two shorter ones.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from dsv3_jax.pipeline.schedules import Schedule, ScheduleName, in_ticks, make_schedule

PARTS = ("F", "I", "W", "IW")
"""A forward pass; gradients by a stage's input alone, by its weights alone, and both in one go."""

_AFTER = 4  # as many micro-batches as stages, times this, show how a schedule goes on


@dataclasses.dataclass(frozen=True)
class ScheduleFacts:
    """Of one step.

    Attributes:
      ticks: in which all ranks hand on what they computed.
      kept, activations, gradients: places a rank has, the most of any rank, as `pipeline_tables.Places` says.
      ways: arrays of hidden states or gradients that a rank hands on in every tick.
      parts: [rank, direction, part] how often a rank computes each part of PARTS for micro-batches of a direction.
      seconds: of the whole step in lockstep, every tick as long as its longest rank, for the costs that were given.
    """

    ticks: float
    kept: int
    activations: int
    gradients: int
    ways: int
    parts: np.ndarray
    seconds: float

    def stage(self, rank: int, direction: int) -> int:
        """Which stage's layers a rank computes for micro-batches of a direction."""
        return rank if direction == 0 else self.parts.shape[0] - 1 - rank

    @property
    def of_stages(self) -> np.ndarray:
        """[stage, part]: `parts` by stage, over the ranks that hold it."""
        total = self.parts[:, 0].copy()
        if self.parts.shape[1] == 2:
            total += self.parts[::-1, 1]
        return total


@functools.lru_cache(maxsize=1024)
def schedule_facts(
    name: ScheduleName, ranks: int, passes: int, costs: tuple[tuple[float, ...], ...] = ()
) -> ScheduleFacts:
    """Of a schedule that can place so many micro-batches.

    Args:
      costs: seconds (or any unit) of every stage's parts, in the order of PARTS.
    """
    first = _AFTER * ranks + passes % 2
    if passes <= 2 * first:
        return _counted(name, ranks, passes, costs)
    near, far = (_counted(name, ranks, m, costs) for m in (first, first + 2))
    more = (passes - first) / 2
    return dataclasses.replace(
        near,
        ticks=near.ticks + more * (far.ticks - near.ticks),
        parts=near.parts + more * (far.parts - near.parts),
        seconds=near.seconds + more * (far.seconds - near.seconds),
    )


def _counted(name: ScheduleName, ranks: int, passes: int, costs: tuple[tuple[float, ...], ...]) -> ScheduleFacts:
    ticks = _ticks(name, ranks, passes)
    seconds = 0.0
    if costs:
        of_stage = np.zeros((ranks + 1, len(PARTS) + 1))  # the last row and column are of nothing
        of_stage[:ranks, : len(PARTS)] = costs
        spent = of_stage[ticks.forward_stage, 0] + of_stage[ticks.backward_stage, ticks.backward_part]
        seconds = float(spent.max(axis=1).sum())
    schedule = make_schedule(name, ranks, passes)
    parts = np.zeros((ranks, schedule.directions, len(PARTS)))
    for direction in range(schedule.directions):
        parts[:, direction, 0] = (ticks.forward_direction == direction).sum(axis=0)
        for part in range(1, len(PARTS)):
            done = (ticks.backward_part == part) & (ticks.backward_direction == direction)
            parts[:, direction, part] = done.sum(axis=0)
    places = _places(schedule, ticks.when)
    return ScheduleFacts(len(ticks.forward_stage), *places, ways=2 * schedule.directions, parts=parts, seconds=seconds)


@dataclasses.dataclass(frozen=True)
class _Ticks:
    """[tick, rank] what is computed, -1 for nothing; `when` [part of F, I, W; rank; micro-batch] in which tick."""

    forward_stage: np.ndarray
    forward_direction: np.ndarray
    backward_stage: np.ndarray
    backward_direction: np.ndarray
    backward_part: np.ndarray
    when: np.ndarray


@functools.lru_cache(maxsize=64)
def _ticks(name: ScheduleName, ranks: int, passes: int) -> _Ticks:
    schedule = make_schedule(name, ranks, passes)
    ticks = in_ticks(schedule)
    tables = np.full((5, len(ticks), ranks), -1)
    forward_stage, forward_direction, backward_stage, backward_direction, backward_part = tables
    when = np.zeros((3, ranks, passes), int)
    for tick, actions in enumerate(ticks):
        for rank, action in enumerate(actions):
            backward = ""
            for chunk in action or ():
                direction = schedule.direction(chunk.micro_batch)
                when["FIW".index(chunk.part), rank, chunk.micro_batch] = tick
                if chunk.part == "F":
                    forward_stage[tick, rank] = schedule.stage(rank, direction)
                    forward_direction[tick, rank] = direction
                else:
                    backward += chunk.part
                    backward_stage[tick, rank] = schedule.stage(rank, direction)
                    backward_direction[tick, rank] = direction
            if backward:
                backward_part[tick, rank] = PARTS.index(backward)
    return _Ticks(forward_stage, forward_direction, backward_stage, backward_direction, backward_part, when)


def _places(schedule: Schedule, when: np.ndarray) -> tuple[int, int, int]:
    """(kept, activations, gradients): the most that any rank holds at once, each from its tick to its last use."""
    forward, by_input, by_weights = when
    ranks, passes = forward.shape
    direction = np.array([schedule.direction(m) for m in range(passes)])
    rank = np.arange(ranks)[:, None]
    onward = np.where(direction == 0, 1, -1)
    stage = np.where(direction == 0, rank, ranks - 1 - rank)
    before, after = np.clip(rank - onward, 0, ranks - 1), np.clip(rank + onward, 0, ranks - 1)
    micro_batch = np.arange(passes)
    came = forward[before, micro_batch] + 1
    back = np.where(stage == ranks - 1, forward, by_input[after, micro_batch]) + 1
    return (
        _most_at_once(forward, by_weights, np.ones_like(stage, bool)),
        _most_at_once(came, forward, stage > 0),
        _most_at_once(back, by_weights, np.ones_like(stage, bool)),
    )


def _most_at_once(first: np.ndarray, last: np.ndarray, counted: np.ndarray) -> int:
    """Of the spans [first, last] of every rank, the most that overlap."""
    ranks = first.shape[0]
    change = np.zeros((ranks, max(first.max(), last.max()) + 2), int)
    rank = np.broadcast_to(np.arange(ranks)[:, None], first.shape)
    np.add.at(change, (rank[counted], first[counted]), 1)
    np.add.at(change, (rank[counted], last[counted] + 1), -1)
    return int(change.cumsum(axis=1).max())
