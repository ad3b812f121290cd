"""Pipeline schedules as data: who computes which chunk, in which order (report section 3.2.1, figure 5).

A chunk is a third of one micro-batch's work on one stage: its forward pass, the gradient by the stage's input, or the
gradient by the stage's weights. What a rank does as one unit is an `Action`, a set of chunks: the last two together
are a full backward pass; all three, of two micro-batches, are DualPipe's overlapped pair.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator
from typing import Literal

from dsv3_jax.errors import ConfigError

Part = Literal["F", "I", "W"]
"""Forward, gradient by the input, gradient by the weights; a full backward pass, the report's B, is I and W."""

ScheduleName = Literal["1f1b", "zb1p", "dualpipe"]


@dataclasses.dataclass(frozen=True, order=True)
class Chunk:
    """One part of one micro-batch's work, on the stage its rank holds for the micro-batch's direction."""

    part: Part
    micro_batch: int


Action = tuple[Chunk, ...]
"""What a rank does at a stretch: (F), (I), (W), (I, W) of one micro-batch, or (F, I, W) with F of another."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The programs of all ranks.

    Attributes:
      name: which method.
      ranks: devices along the pipeline, which is also the number of stages.
      micro_batches: numbered from 0. With two directions the first half enters at rank 0, the second at the last.
      directions: 1 or 2; the copies of the parameters a rank holds.
      programs: a rank's actions in order.
    """

    name: ScheduleName
    ranks: int
    micro_batches: int
    directions: int
    programs: tuple[tuple[Action, ...], ...]

    def direction(self, micro_batch: int) -> int:
        """0 for micro-batches that enter at rank 0, 1 for those that enter at the last rank."""
        return micro_batch * self.directions // self.micro_batches

    def stage(self, rank: int, direction: int) -> int:
        """Which stage `rank` holds for micro-batches of `direction`."""
        return rank if direction == 0 else self.ranks - 1 - rank

    def needs(self, rank: int, chunk: Chunk) -> Chunk | tuple[int, Chunk] | None:
        """What must be done before: a chunk of the same rank, (rank, chunk) of another one, or nothing.

        A rank's own forward pass precedes its gradients too; it is implied by the chain along the pipeline.
        """
        onward = 1 if self.direction(chunk.micro_batch) == 0 else -1
        stage = self.stage(rank, self.direction(chunk.micro_batch))
        if chunk.part == "F":
            return None if stage == 0 else (rank - onward, chunk)
        if chunk.part == "I":
            last = stage == self.ranks - 1
            return Chunk("F", chunk.micro_batch) if last else (rank + onward, chunk)
        return Chunk("I", chunk.micro_batch)


def make_schedule(name: ScheduleName, ranks: int, micro_batches: int) -> Schedule:
    """The schedule of that name.

    Raises:
      ConfigError: no such schedule, or micro-batches it cannot place (DualPipe: an even number of ranks and at least
        twice as many micro-batches, an even number too; ZB1P: at least as many as ranks).
    """
    makers: dict[str, Callable[[int, int], Schedule]] = {
        "1f1b": one_forward_one_backward,
        "zb1p": zero_bubble,
        "dualpipe": dualpipe,
    }
    if name not in makers:
        raise ConfigError(f"there is no pipeline schedule '{name}'; choose of {', '.join(makers)}")
    if ranks < 1 or micro_batches < 1:
        raise ConfigError(f"a pipeline needs stages and micro-batches, not {ranks} and {micro_batches}")
    return makers[name](ranks, micro_batches)


def one_forward_one_backward(ranks: int, micro_batches: int) -> Schedule:
    """1F1B: as soon as gradients arrive a rank alternates between a forward and a full backward pass."""

    def program(rank: int) -> Iterator[Action]:
        ahead = min(ranks - 1 - rank, micro_batches)
        for m in range(micro_batches + ahead):
            if m < micro_batches:
                yield (Chunk("F", m),)
            if m >= ahead:
                yield (Chunk("I", m - ahead), Chunk("W", m - ahead))

    return Schedule("1f1b", ranks, micro_batches, 1, tuple(tuple(program(rank)) for rank in range(ranks)))


def zero_bubble(ranks: int, micro_batches: int) -> Schedule:
    """ZB1P: 1F1B with backward passes split; weights' gradients wait, longer on later ranks, to fill the end.

    Rank r keeps r of them back, so that every rank holds the activations of `ranks` micro-batches.
    """
    if micro_batches < ranks:
        raise ConfigError(f"zb1p needs at least as many micro-batches as stages ({ranks}), not {micro_batches}")

    def program(rank: int) -> Iterator[Action]:
        ahead = ranks - 1 - rank
        done = 0
        for m in range(micro_batches + ahead):
            if m < micro_batches:
                yield (Chunk("F", m),)
            if m >= ahead:
                yield (Chunk("I", m - ahead),)
                if m - ahead >= rank:
                    yield (Chunk("W", done),)
                    done += 1
        for m in range(done, micro_batches):
            yield (Chunk("W", m),)

    return Schedule("zb1p", ranks, micro_batches, 1, tuple(tuple(program(rank)) for rank in range(ranks)))


def dualpipe(ranks: int, micro_batches: int) -> Schedule:
    """DualPipe: micro-batches enter at both ends; forward passes hide behind backward ones of the other direction."""
    if ranks % 2:
        raise ConfigError(f"dualpipe needs an even number of stages, not {ranks}; use {ranks - 1 or 2} or {ranks + 1}")
    if micro_batches % 2 or micro_batches < 2 * ranks:
        raise ConfigError(
            f"dualpipe needs an even number of micro-batches, at least twice the stages ({2 * ranks}), "
            f"not {micro_batches}"
        )
    programs = tuple(_DualPipeRank(ranks, micro_batches, rank).program() for rank in range(ranks))
    return Schedule("dualpipe", ranks, micro_batches, 2, programs)


class _DualPipeRank:
    """Writes the program of one rank. Of the directions, `near` enters at this rank's end and `far` at the other."""

    def __init__(self, ranks: int, micro_batches: int, rank: int):
        self.half = ranks // 2
        self.depth = min(rank, ranks - 1 - rank)
        self.main = micro_batches // 2 - ranks + self.depth + 1
        first, second = range(micro_batches // 2), range(micro_batches // 2, micro_batches)
        self.near, self.far = (first, second) if rank < self.half else (second, first)
        self.next: dict[tuple[Part, range], Iterator[int]] = {
            (part, way): iter(way) for part in ("F", "I") for way in (self.near, self.far)
        }
        self.waiting: collections.deque[Chunk] = collections.deque()
        self.actions: list[Action] = []

    def program(self) -> tuple[Action, ...]:
        near, far = self.near, self.far
        inner = self.half - self.depth - 1
        for _ in range(2 * inner):
            self.forward(near)
        for _ in range(self.depth + 1):
            self.forward(near)
            self.forward(far)
        for _ in range(inner):
            self.backward(far, split=True)
            self.weights()
            self.forward(far)
        for pair in range(self.main):
            if pair == 0 and inner == 0:  # the two middle ranks: nothing to hide the first pass behind yet
                self.forward(near)
                self.backward(far)
            else:
                self.overlapped(near, far)
            self.overlapped(far, near)
        for _ in range(inner):
            self.backward(far)
            self.overlapped(far, near)
        for step in range(2 * (self.depth + 1)):  # the second half keeps its weights' gradients back
            self.backward(far if step % 2 == 0 else near, split=step > self.depth)
        for _ in range(inner):
            self.weights()
            self.backward(near, split=True)
        while self.waiting:
            self.weights()
        return tuple(self.actions)

    def forward(self, way: range) -> None:
        self.actions.append((Chunk("F", next(self.next["F", way])),))

    def backward(self, way: range, *, split: bool = False) -> None:
        micro_batch = next(self.next["I", way])
        weights = Chunk("W", micro_batch)
        if split:
            self.waiting.append(weights)
            self.actions.append((Chunk("I", micro_batch),))
        else:
            self.actions.append((Chunk("I", micro_batch), weights))

    def overlapped(self, forward: range, backward: range) -> None:
        micro_batch = next(self.next["I", backward])
        self.actions.append(
            (Chunk("F", next(self.next["F", forward])), Chunk("I", micro_batch), Chunk("W", micro_batch))
        )

    def weights(self) -> None:
        self.actions.append((self.waiting.popleft(),))


def check_schedule(schedule: Schedule) -> None:
    """That every chunk is done once on every rank and that the programs can run to their end.

    Raises:
      ValueError: what is missing, there twice, or waited for in vain.
    """
    every = {Chunk(part, m) for part in ("F", "I", "W") for m in range(schedule.micro_batches)}
    for rank, program in enumerate(schedule.programs):
        counts = collections.Counter(chunk for action in program for chunk in action)
        wrong = [chunk for chunk in sorted(every | set(counts)) if counts[chunk] != (chunk in every)]
        if wrong:
            raise ValueError(f"rank {rank} does {wrong[0]} {counts[wrong[0]]} times")
    in_ticks(schedule)


def in_ticks(schedule: Schedule) -> list[list[Action | None]]:
    """The programs in lockstep: [tick][rank], each action in the first tick after all that it needs.

    Raises:
      ValueError: ranks that wait for each other for ever.
    """
    done: set[tuple[int, Chunk]] = set()
    place = [0] * schedule.ranks
    ticks: list[list[Action | None]] = []
    while any(at < len(program) for at, program in zip(place, schedule.programs, strict=True)):
        tick: list[Action | None] = []
        for rank, program in enumerate(schedule.programs):
            action = program[place[rank]] if place[rank] < len(program) else None
            tick.append(action if action is not None and _ready(schedule, rank, action, done) else None)
        if not any(tick):
            stuck = next(rank for rank, at in enumerate(place) if at < len(schedule.programs[rank]))
            raise ValueError(f"rank {stuck} waits for ever before {schedule.programs[stuck][place[stuck]]}")
        for rank, action in enumerate(tick):
            place[rank] += action is not None
            done.update((rank, chunk) for chunk in action or ())
        ticks.append(tick)
    return ticks


def requirements(schedule: Schedule, rank: int, action: Action) -> Iterator[tuple[int, Chunk]]:
    """(rank, chunk) of everything outside `action` that must be done before it."""
    for chunk in action:
        need = schedule.needs(rank, chunk)
        if isinstance(need, Chunk):
            need = (rank, need)
        if need is not None and not (need[0] == rank and need[1] in action):
            yield need


def _ready(schedule: Schedule, rank: int, action: Action, done: set[tuple[int, Chunk]]) -> bool:
    return all(need in done for need in requirements(schedule, rank, action))
