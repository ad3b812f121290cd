"""What a pipeline schedule asks of its ranks, counted from the tick table that the training step runs.

A schedule of many micro-batches repeats itself between its two ends. It is counted from two shorter schedules, so that
a plan needs milliseconds.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from jaxtyping import Float

from dsv3_jax.pipeline.schedules import ScheduleName, schedule_of_step
from dsv3_jax.pipeline.slots import LOOK_UP, LOOK_UP_GRADIENT, PREDICT, TickTable, tick_table

PARTS = ("F", "I", "W", "IW")
"""Forward pass, backward for input, backward for weights, full backward; the last three by `backward_parts`."""

_COUNTED_PER_RANK = 4  # micro-batches per rank from which on a schedule repeats itself


@dataclasses.dataclass(frozen=True)
class ScheduleFacts:
    """The counts of one step.

    Attributes:
      ticks: ticks of the step.
      kept, activations, gradients: slots of each buffer of a rank, as in `slots.SlotCounts`.
      sends: activations and gradients that a rank sends.
      look_ups, predictions, look_up_gradients: ticks in which all ranks compute these together (`TickEntry.together`).
      parts: how often a rank computes each part of PARTS for micro-batches of a direction.
      seconds: time of the step if every tick takes as long as its slowest rank, in the unit of the given costs.
    """

    ticks: float
    kept: int
    activations: int
    gradients: int
    sends: float
    look_ups: float
    predictions: float
    look_up_gradients: float
    parts: Float[np.ndarray, "ranks directions parts"]
    seconds: float

    def stage(self, rank: int, direction: int) -> int:
        """Returns the stage that a rank computes for micro-batches of a direction."""
        return rank if direction == 0 else self.parts.shape[0] - 1 - rank

    @property
    def of_stages(self) -> Float[np.ndarray, "stages parts"]:
        """`parts` by stage instead of by rank, summed over the ranks that hold the stage."""
        total = self.parts[:, 0].copy()
        if self.parts.shape[1] == 2:
            total += self.parts[::-1, 1]
        return total


@functools.lru_cache(maxsize=1024)
def schedule_facts(
    name: ScheduleName, ranks: int, passes: int, costs: tuple[tuple[float, ...], ...] = (), prediction: float = 0.0
) -> ScheduleFacts:
    """Returns the counts of a schedule.

    Args:
      passes: micro-batches of a step.
      costs: seconds (or any unit) of each part of PARTS, one row per stage; without them `seconds` is 0.
      prediction: seconds that all ranks compute, or wait, at the beginning of a tick with predictions.

    Raises:
      ConfigError: see `schedules.check_micro_batches`.
    """
    first = _COUNTED_PER_RANK * ranks + passes % 2
    if passes <= 2 * first:
        return _counted(name, ranks, passes, costs, prediction)
    near, far = (_counted(name, ranks, m, costs, prediction) for m in (first, first + 2))
    more = (passes - first) / 2
    grow = {}
    for field in ("ticks", "sends", "look_ups", "predictions", "look_up_gradients", "parts", "seconds"):
        at_first = getattr(near, field)
        grow[field] = at_first + more * (getattr(far, field) - at_first)
    return dataclasses.replace(near, **grow)


def _counted(
    name: ScheduleName, ranks: int, passes: int, costs: tuple[tuple[float, ...], ...], prediction: float
) -> ScheduleFacts:
    table, directions = _table(name, ranks, passes)
    entries = table.entries
    together = [entries.together[:, 0] & bit != 0 for bit in (LOOK_UP, PREDICT, LOOK_UP_GRADIENT)]
    look_ups, predictions, look_up_gradients = (int(ticks.sum()) for ticks in together)
    seconds = 0.0
    if costs:
        of_stages = np.zeros((ranks + 1, len(PARTS)))  # stage -1, which is nothing, costs nothing
        of_stages[:ranks] = costs
        spent = of_stages[entries.forward_stage, 0] + of_stages[entries.backward_stage, entries.backward_parts]
        seconds = float(spent.max(axis=1).sum()) + predictions * prediction
    parts = np.zeros((ranks, directions, len(PARTS)))
    for direction in range(directions):
        parts[:, direction, 0] = (entries.forward_direction == direction).sum(axis=0)
        for part in range(1, len(PARTS)):
            done = (entries.backward_parts == part) & (entries.backward_direction == direction)
            parts[:, direction, part] = done.sum(axis=0)
    slots = dataclasses.asdict(table.slots)
    return ScheduleFacts(
        ticks=table.ticks,
        **slots,
        sends=table.sends,
        look_ups=look_ups,
        predictions=predictions,
        look_up_gradients=look_up_gradients,
        parts=parts,
        seconds=seconds,
    )


@functools.lru_cache(maxsize=64)
def _table(name: ScheduleName, ranks: int, passes: int) -> tuple[TickTable, int]:
    """Returns the tick table of a schedule, and how many directions it has."""
    schedule = schedule_of_step(name, ranks, passes)
    return tick_table(schedule), schedule.directions
