"""When each action of a pipeline schedule runs, and what that costs: bubble and activations (report table 2)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from dsv3_jax.pipeline.schedules import Action, Chunk, PipelineSchedule, ScheduleName, make_schedule


@dataclasses.dataclass(frozen=True)
class Durations:
    """Times of one micro-batch on one stage, in any unit; the letters are those of table 2.

    Attributes:
      forward: F, the forward pass.
      backward: B, the full backward pass.
      weights: W, the part of B that is the backward for weights.
      overlapped: F&B, a forward and a full backward pass that overlap.
    """

    forward: float = 1.0
    backward: float = 2.0
    weights: float = 1.0
    overlapped: float = 3.0

    def of(self, action: Action) -> float:
        """Returns how long an action takes."""
        parts = "".join(chunk.part for chunk in action)
        return {
            "F": self.forward,
            "I": self.backward - self.weights,
            "W": self.weights,
            "IW": self.backward,
            "FIW": self.overlapped,
        }[parts]


@dataclasses.dataclass(frozen=True)
class Timed:
    """An action with the times at which it starts and ends."""

    action: Action
    start: float
    end: float


@dataclasses.dataclass(frozen=True)
class Timeline:
    """The times of all actions of a schedule.

    Attributes:
      ranks: the actions of each rank, in order.
      total: the time at which the last action ends.
    """

    ranks: tuple[tuple[Timed, ...], ...]
    total: float

    def bubble(self) -> float:
        """Returns the idle time of the rank that is idle longest."""
        return max(self.total - sum(timed.end - timed.start for timed in rank) for rank in self.ranks)

    def peak_activations(self) -> list[int]:
        """Returns, per rank, the most micro-batches between the start of their F and the end of their I."""
        return [self._peak(rank, "I") for rank in self.ranks]

    def peak_held_for_weights(self) -> list[int]:
        """Returns, per rank, the most micro-batches between the start of their F and the end of their W.

        Until W is done, the inputs of the matrix products are still needed.
        """
        return [self._peak(rank, "W") for rank in self.ranks]

    @staticmethod
    def _peak(rank: tuple[Timed, ...], last: str) -> int:
        held = peak = 0
        for timed in rank:
            parts = [chunk.part for chunk in timed.action]
            held += "F" in parts
            peak = max(peak, held)
            held -= last in parts
        return peak


@dataclasses.dataclass(frozen=True)
class ScheduleFigures:
    """A row of the report's table 2, measured on the simulated schedule.

    Attributes:
      bubble: idle time of the rank that is idle longest, in the unit of the durations.
      total: time of a step.
      bubble_fraction: bubble divided by total.
      parameter_copies: stages whose parameters a rank holds.
      activations: most micro-batches of a rank between the start of F and the end of I.
      held_for_weights: most micro-batches of a rank between the start of F and the end of W.
    """

    bubble: float
    total: float
    bubble_fraction: float
    parameter_copies: int
    activations: int
    held_for_weights: int


def simulate(schedule: PipelineSchedule, duration_of: Callable[[Action], float]) -> Timeline:
    """Returns when every action runs if each starts as soon as its rank is free and all that it requires is done.

    Args:
      duration_of: how long an action takes, such as `Durations().of`.

    Raises:
      ValueError: ranks that wait for each other forever.
    """
    ended: dict[tuple[int, Chunk], float] = {}
    ranks: list[list[Timed]] = [[] for _ in range(schedule.ranks)]
    advanced = True
    while advanced:
        advanced = False
        for rank, program in enumerate(schedule.programs):
            done = ranks[rank]
            while len(done) < len(program):
                action = program[len(done)]
                required = [ended.get(key) for key in schedule.requirements(rank, action)]
                times = [time for time in required if time is not None]
                if len(times) < len(required):
                    break
                start = max(times, default=0.0)
                if done:
                    start = max(start, done[-1].end)
                end = start + duration_of(action)
                done.append(Timed(action, start, end))
                for chunk in action:
                    ended[rank, chunk] = end
                advanced = True
    for rank, program in enumerate(schedule.programs):
        if len(ranks[rank]) < len(program):
            raise ValueError(f"rank {rank} waits forever before {program[len(ranks[rank])]}")
    total = max((rank[-1].end for rank in ranks if rank), default=0.0)
    return Timeline(tuple(map(tuple, ranks)), total)


def schedule_figures(
    name: ScheduleName, ranks: int, micro_batches: int, durations: Durations | None = None
) -> ScheduleFigures:
    """Returns the figures of a simulated schedule.

    Raises:
      ConfigError: see `schedules.check_micro_batches`.
    """
    schedule = make_schedule(name, ranks, micro_batches)
    timeline = simulate(schedule, (durations or Durations()).of)
    bubble = timeline.bubble()
    return ScheduleFigures(
        bubble=bubble,
        total=timeline.total,
        bubble_fraction=bubble / timeline.total,
        parameter_copies=schedule.directions,
        activations=max(timeline.peak_activations()),
        held_for_weights=max(timeline.peak_held_for_weights()),
    )


def published_bubble(name: ScheduleName, ranks: int, durations: Durations) -> float:
    """Returns the bubble by the formulas of the report's table 2, with PP = `ranks`.

    1F1B: (PP - 1) (F + B); ZB1P: (PP - 1) (F + B - 2W); DualPipe: (PP/2 - 1) (F&B + B - 3W).

    The simulation agrees with the formula of ZB1P if W <= F, and with that of DualPipe if F = W = B / 2. With other
    durations ranks also wait for each other inside the steady phase.
    """
    f, b, w = durations.forward, durations.backward, durations.weights
    if name == "1f1b":
        return (ranks - 1) * (f + b)
    if name == "zb1p":
        return (ranks - 1) * (f + b - 2 * w)
    return (ranks / 2 - 1) * (durations.overlapped + b - 3 * w)


def text_picture(timeline: Timeline, *, unit: float = 1.0) -> str:
    """Returns the schedule as text, one line per rank; dots are idle time.

    The letters are those of `label`.

    Raises:
      ValueError: `unit`, the time of the narrowest column, exceeds the shortest action.
    """
    labels = [label(timed.action) for rank in timeline.ranks for timed in rank]
    spans = [round((timed.end - timed.start) / unit) for rank in timeline.ranks for timed in rank]
    if min(spans) < 1:
        raise ValueError(f"unit ({unit}) must not exceed the shortest action")
    width = max(-(-(len(text) + 1) // span) for text, span in zip(labels, spans, strict=True))
    lines = []
    for number, rank in enumerate(timeline.ranks):
        line = ["."] * (width * round(timeline.total / unit))
        for timed in rank:
            start, end = width * round(timed.start / unit), width * round(timed.end / unit)
            line[start:end] = label(timed.action).ljust(end - start - 1, "-") + " "
        lines.append(f"rank {number:2} |{''.join(line)}|")
    return "\n".join(lines)


def label(action: Action) -> str:
    """Returns a short name: F3, I3, W3, B3 for a full backward of micro-batch 3, or F8B3 for an overlapped pair."""
    names = {chunk.part: chunk.micro_batch for chunk in action}
    if "I" in names and "W" in names:
        return (f"F{names['F']}" if "F" in names else "") + f"B{names['I']}"
    return "".join(f"{part}{micro_batch}" for part, micro_batch in names.items())
