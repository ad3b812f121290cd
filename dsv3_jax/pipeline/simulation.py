"""What a pipeline schedule costs: its bubble and the activations it holds (report section 3.2.1, table 2)."""

from __future__ import annotations

import dataclasses

from dsv3_jax.pipeline.schedules import (
    Action,
    Chunk,
    Schedule,
    ScheduleName,
    make_schedule,
    requirements,
)


@dataclasses.dataclass(frozen=True)
class Durations:
    """Times of one micro-batch's chunks on one stage, in any unit.

    Attributes:
      forward: F.   backward: B, the full backward pass.   weights: W, the part of B for the weights' gradients.
      overlapped: F&B, a forward pass hidden behind a backward one.
    """

    forward: float = 1.0
    backward: float = 2.0
    weights: float = 1.0
    overlapped: float = 3.0

    def of(self, action: Action) -> float:
        """How long an action takes."""
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
    """An action and when it runs."""

    action: Action
    start: float
    end: float


@dataclasses.dataclass(frozen=True)
class Timeline:
    """A schedule run with given durations, each action as soon as its rank and all that it needs are done.

    Attributes:
      ranks: each rank's actions in order.
      total: when the last ends.
    """

    schedule: Schedule
    ranks: tuple[tuple[Timed, ...], ...]
    total: float

    def bubble(self) -> float:
        """Idle time of the rank that is idle longest."""
        return max(self.total - sum(timed.end - timed.start for timed in rank) for rank in self.ranks)

    def peak_activations(self) -> list[int]:
        """Each rank's micro-batches whose forward pass has begun and whose gradient by the input has not ended."""
        return [self._peak(rank, "I") for rank in self.ranks]

    def peak_held_for_weights(self) -> list[int]:
        """The same until the weights' gradient has ended: where it waits, the inputs of products are still held."""
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
    """A row of the report's table 2, found by running the schedule.

    Attributes:
      bubble: idle time of a rank, in the unit of the durations.   total: time of a step.
      bubble_fraction: of the total.
      parameter_copies: stages' parameters a rank holds.
      activations: most micro-batches in flight on a rank, until their gradient by the input is done.
      held_for_weights: the same until their weights' gradient is done.
    """

    bubble: float
    total: float
    bubble_fraction: float
    parameter_copies: int
    activations: int
    held_for_weights: int


def simulate(schedule: Schedule, durations: Durations) -> Timeline:
    """Runs the programs.

    Raises:
      ValueError: ranks that wait for each other for ever.
    """
    ended: dict[tuple[int, Chunk], float] = {}
    ranks: list[list[Timed]] = [[] for _ in range(schedule.ranks)]
    moved = True
    while moved:
        moved = False
        for rank, program in enumerate(schedule.programs):
            while len(ranks[rank]) < len(program):
                action = program[len(ranks[rank])]
                needs = list(requirements(schedule, rank, action))
                if any(need not in ended for need in needs):
                    break
                free = ranks[rank][-1].end if ranks[rank] else 0.0
                start = max([free, *(ended[need] for need in needs)])
                ranks[rank].append(Timed(action, start, start + durations.of(action)))
                ended.update({(rank, chunk): ranks[rank][-1].end for chunk in action})
                moved = True
    for rank, program in enumerate(schedule.programs):
        if len(ranks[rank]) < len(program):
            raise ValueError(f"rank {rank} waits for ever before {program[len(ranks[rank])]}")
    total = max((rank[-1].end for rank in ranks if rank), default=0.0)
    return Timeline(schedule, tuple(map(tuple, ranks)), total)


def schedule_figures(
    name: ScheduleName, ranks: int, micro_batches: int, durations: Durations | None = None
) -> ScheduleFigures:
    """Bubble, parameters and activations of a schedule, from a simulation; errors as in `make_schedule`."""
    schedule = make_schedule(name, ranks, micro_batches)
    timeline = simulate(schedule, durations or Durations())
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
    """The bubble by the formulas of table 2.

    The simulation agrees with ZB1P's where W <= F, and with DualPipe's where F = W = B / 2: elsewhere ranks also wait
    for each other inside the steady phase.
    """
    f, b, w = durations.forward, durations.backward, durations.weights
    if name == "1f1b":
        return (ranks - 1) * (f + b)
    if name == "zb1p":
        return (ranks - 1) * (f + b - 2 * w)
    return (ranks / 2 - 1) * (durations.overlapped + b - 3 * w)


def text_picture(timeline: Timeline, *, unit: float = 1.0) -> str:
    """One line a rank; F forward, B full backward, I and W its two parts, F8B3 overlapped; dots are idle time."""
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
    """A short name: F3, B3, I3, W3, or F8B3 for an overlapped pair."""
    names = {chunk.part: chunk.micro_batch for chunk in action}
    if "I" in names and "W" in names:
        return (f"F{names['F']}" if "F" in names else "") + f"B{names['I']}"
    return "".join(f"{part}{micro_batch}" for part, micro_batch in names.items())
