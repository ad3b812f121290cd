"""Pipeline schedules: which rank computes which part of which micro-batch, in which order (report section 3.2.1).

Three schedules are here, by the names of the report's table 2: 1F1B, ZB1P and DualPipe (figure 5).
`schedule_of_step` says in which form a training step runs them.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple, get_args

from dsv3_jax.errors import ConfigError

Part = Literal["F", "I", "W"]
"""F is the forward pass, I the backward for input, W the backward for weights; I and W together are a full backward."""

ScheduleName = Literal["1f1b", "zb1p", "dualpipe"]


class Chunk(NamedTuple):
    """One part of the work on one micro-batch, by the stage that a rank holds for the micro-batch's direction."""

    part: Part
    micro_batch: int


Action = tuple[Chunk, ...]
"""The chunks that a rank computes as one unit: (F), (I), (W), a full backward (I, W), or an overlapped pair (F, I, W).

An overlapped pair is a forward pass and a full backward of another micro-batch, of DualPipe's other direction.
"""


@dataclasses.dataclass(frozen=True)
class PipelineSchedule:
    """The order of the actions on every rank.

    Attributes:
      name: the method.
      ranks: devices along the pipeline; also the number of stages.
      micro_batches: how many there are, numbered from 0. With two directions the first half enters the pipeline at
        rank 0 and the second half at the last rank.
      directions: 1 or 2; also the number of stages whose parameters a rank holds.
      programs: the actions of each rank, in order.
    """

    name: ScheduleName
    ranks: int
    micro_batches: int
    directions: int
    programs: tuple[tuple[Action, ...], ...]

    def direction(self, micro_batch: int) -> int:
        """Returns 0 for a micro-batch that enters at rank 0, and 1 for one that enters at the last rank."""
        return micro_batch * self.directions // self.micro_batches

    def stage(self, rank: int, direction: int) -> int:
        """Returns the stage that `rank` computes for micro-batches of `direction`."""
        return rank if direction == 0 else self.ranks - 1 - rank

    def next_rank(self, rank: int, direction: int) -> int:
        """Returns the rank to which `rank` sends activations of `direction`, and from which gradients come back."""
        return rank + 1 if direction == 0 else rank - 1

    def requirements(self, rank: int, action: Action) -> Iterator[tuple[int, Chunk]]:
        """Yields (rank, chunk) for each chunk outside `action` that must be done before it.

        The forward pass of a rank's own stage is left out where a later stage's gradient, which needs it, is listed.
        """
        for chunk in action:
            direction = self.direction(chunk.micro_batch)
            stage = self.stage(rank, direction)
            if chunk.part == "F":
                if stage > 0:
                    yield self.next_rank(rank, 1 - direction), chunk
            elif chunk.part == "I":
                if stage < self.ranks - 1:
                    yield self.next_rank(rank, direction), chunk
                else:
                    yield rank, Chunk("F", chunk.micro_batch)
            elif (own := Chunk("I", chunk.micro_batch)) not in action:
                yield rank, own


def check_micro_batches(name: ScheduleName, ranks: int, micro_batches: int) -> None:
    """Checks that the schedule exists for so many ranks and micro-batches.

    Raises:
      ConfigError: there is no schedule of that name; DualPipe without an even number of ranks and an even number of
        micro-batches, at least two per rank; ZB1P with fewer micro-batches than ranks; or none of either.
    """
    if name not in get_args(ScheduleName):
        raise ConfigError(f"there is no pipeline schedule '{name}'; choose of {', '.join(get_args(ScheduleName))}")
    if ranks < 1 or micro_batches < 1:
        raise ConfigError(f"a pipeline needs stages and micro-batches, not {ranks} and {micro_batches}")
    if name == "zb1p" and micro_batches < ranks:
        raise ConfigError(f"zb1p needs at least as many micro-batches as stages ({ranks}), not {micro_batches}")
    if name == "dualpipe" and ranks % 2:
        raise ConfigError(f"dualpipe needs an even number of stages, not {ranks}; use {ranks - 1 or 2} or {ranks + 1}")
    if name == "dualpipe" and (micro_batches % 2 or micro_batches < 2 * ranks):
        raise ConfigError(
            f"dualpipe needs an even number of micro-batches, at least twice the stages ({2 * ranks}), "
            f"not {micro_batches}"
        )


def make_schedule(name: ScheduleName, ranks: int, micro_batches: int) -> PipelineSchedule:
    """Returns the schedule of that name.

    Raises:
      ConfigError: see `check_micro_batches`.
    """
    check_micro_batches(name, ranks, micro_batches)
    programs: dict[ScheduleName, Callable[[int, int, int], Iterator[Action]]] = {
        "1f1b": one_forward_one_backward,
        "zb1p": zero_bubble,
        "dualpipe": dualpipe,
    }
    return PipelineSchedule(
        name=name,
        ranks=ranks,
        micro_batches=micro_batches,
        directions=2 if name == "dualpipe" else 1,
        programs=tuple(tuple(programs[name](rank, ranks, micro_batches)) for rank in range(ranks)),
    )


def schedule_of_step(name: ScheduleName, ranks: int, micro_batches: int) -> PipelineSchedule:
    """Returns the schedule that the training step runs: `make_schedule`'s, but DualPipe's backward passes are whole.

    All ranks of the step advance in ticks. A tick in which one rank computes half of a backward pass is as long as the
    whole pass that another rank computes. So halves gain little, and less than the work that both compute takes.

    Raises:
      ConfigError: see `check_micro_batches`.
    """
    schedule = make_schedule(name, ranks, micro_batches)
    if name != "dualpipe":
        return schedule
    programs = tuple(tuple(_with_whole_backwards(program)) for program in schedule.programs)
    return dataclasses.replace(schedule, programs=programs)


def _with_whole_backwards(program: tuple[Action, ...]) -> Iterator[Action]:
    """Yields a rank's actions with each backward for weights moved to its backward for input."""
    for action in program:
        parts = [chunk.part for chunk in action]
        if parts == ["I"]:
            yield (*action, Chunk("W", action[0].micro_batch))
        elif parts != ["W"]:
            yield action


def one_forward_one_backward(rank: int, ranks: int, micro_batches: int) -> Iterator[Action]:
    """Yields the actions of a rank in 1F1B: it alternates forward and backward as soon as gradients arrive."""
    ahead = min(ranks - 1 - rank, micro_batches)
    for m in range(micro_batches + ahead):
        if m < micro_batches:
            yield (Chunk("F", m),)
        if m >= ahead:
            yield (Chunk("I", m - ahead), Chunk("W", m - ahead))


def zero_bubble(rank: int, ranks: int, micro_batches: int) -> Iterator[Action]:
    """Yields the actions of a rank in ZB1P: 1F1B with the backward split, and W delayed to fill the bubble at the end.

    Rank r delays W by r micro-batches, so that every rank holds the activations of `ranks` micro-batches.
    """
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


def dualpipe(rank: int, ranks: int, micro_batches: int) -> Iterator[Action]:
    """Yields the actions of a rank in DualPipe, which is figure 5 of the report for 8 ranks and 20 micro-batches.

    Micro-batches enter the pipeline at both ends. In the steady phase (step 4) the forward pass of a micro-batch of one
    direction overlaps the backward pass of one of the other direction. The report draws the order for one example; the
    eight steps and their lengths follow DeepSeek's published code.

    With PP ranks, N micro-batches, and d ranks between this one and the nearer end of the pipeline, there are
    `inner` = PP/2 - d - 1 ranks between this one and the middle. `near` is the direction that enters at the nearer end,
    `far` is the other. W computes the oldest backward for weights that was delayed.

      1. 2 * inner times:         F near
      2. d + 1 times:             F near, F far
      3. inner times:             I far, W, F far
      4. N/2 - PP + d + 1 times:  F near with B far, F far with B near (each pair overlapped)
      5. inner times:             B far, F far with B near (overlapped)
      6. d + 1 times:             B far, B near; the second half of these delays its weight gradients
      7. inner times:             W, I near
      8. until none is left:      W
    """
    depth = min(rank, ranks - 1 - rank)
    inner = ranks // 2 - depth - 1
    first, second = range(micro_batches // 2), range(micro_batches // 2, micro_batches)
    near, far = (first, second) if rank < ranks // 2 else (second, first)
    forwards, backwards = ({way: iter(way) for way in (near, far)} for _ in range(2))
    delayed: collections.deque[Chunk] = collections.deque()

    def forward(way: range) -> Action:
        return (Chunk("F", next(forwards[way])),)

    def backward(way: range) -> Action:
        m = next(backwards[way])
        return Chunk("I", m), Chunk("W", m)

    def backward_for_input(way: range) -> Action:
        for_input, for_weights = backward(way)
        delayed.append(for_weights)
        return (for_input,)

    def backward_for_weights() -> Action:
        return (delayed.popleft(),)

    for _ in range(2 * inner):  # 1
        yield forward(near)
    for _ in range(depth + 1):  # 2
        yield forward(near)
        yield forward(far)
    for _ in range(inner):  # 3
        yield backward_for_input(far)
        yield backward_for_weights()
        yield forward(far)
    for pair in range(micro_batches // 2 - ranks + depth + 1):  # 4
        if pair == 0 and inner == 0:  # on the two middle ranks the first pair is not overlapped
            yield forward(near)
            yield backward(far)
        else:
            yield forward(near) + backward(far)
        yield forward(far) + backward(near)
    for _ in range(inner):  # 5
        yield backward(far)
        yield forward(far) + backward(near)
    for step in range(2 * (depth + 1)):  # 6
        way = far if step % 2 == 0 else near
        yield backward(way) if step <= depth else backward_for_input(way)
    for _ in range(inner):  # 7
        yield backward_for_weights()
        yield backward_for_input(near)
    while delayed:  # 8
        yield backward_for_weights()
