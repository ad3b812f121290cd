"""Checks the counts that plans read of a schedule: against ranks that advance together, and for long schedules."""

from __future__ import annotations

import numpy as np
import pytest

from dsv3_jax.pipeline.facts import PARTS, schedule_facts
from dsv3_jax.pipeline.schedules import Action, Chunk, PipelineSchedule, ScheduleName, schedule_of_step
from dsv3_jax.pipeline.slots import SlotCounts, tick_table

CASES: list[tuple[ScheduleName, int, int]] = [
    ("dualpipe", 4, 8),
    ("dualpipe", 8, 90),
    ("dualpipe", 16, 136),
    ("zb1p", 4, 31),
    ("zb1p", 8, 77),
    ("1f1b", 4, 3),
    ("1f1b", 6, 101),
]
"""In the longer ones only the two ends are counted."""


def advance_together(schedule: PipelineSchedule) -> list[list[Action | None]]:
    """Returns [tick][rank]: each rank does its next action in the first tick after all that the action requires."""
    done: set[tuple[int, Chunk]] = set()
    at = [0] * schedule.ranks
    ticks: list[list[Action | None]] = []
    while any(at[rank] < len(program) for rank, program in enumerate(schedule.programs)):
        tick: list[Action | None] = []
        for rank, program in enumerate(schedule.programs):
            action = program[at[rank]] if at[rank] < len(program) else None
            ready = action is not None and all(key in done for key in schedule.requirements(rank, action))
            tick.append(action if ready else None)
        for rank, action in enumerate(tick):
            at[rank] += action is not None
            done.update((rank, chunk) for chunk in action or ())
        ticks.append(tick)
    return ticks


@pytest.mark.parametrize(("name", "ranks", "passes"), CASES)
def test_counts_are_those_of_ranks_that_advance_together(name: ScheduleName, ranks: int, passes: int) -> None:
    """Every stage has different costs."""
    schedule = schedule_of_step(name, ranks, passes)
    costs = np.random.default_rng(0).uniform(0, 3, (ranks, len(PARTS)))
    facts = schedule_facts(name, ranks, passes, tuple(map(tuple, costs.tolist())), prediction=0.7)

    ticks = advance_together(schedule)
    parts = np.zeros((ranks, schedule.directions, len(PARTS)))
    seconds = 0.0
    together = {"look_ups": (0, "F"), "predictions": (ranks - 1, "I"), "look_up_gradients": (0, "W")}
    counts = dict.fromkeys(together, 0)
    for tick in ticks:
        spent = np.zeros(ranks)
        done = {
            (schedule.stage(rank, schedule.direction(chunk.micro_batch)), chunk.part)
            for rank, action in enumerate(tick)
            for chunk in action or ()
        }
        for what, chunk in together.items():
            counts[what] += chunk in done
        seconds += 0.7 * (together["predictions"] in done)
        for rank, action in enumerate(tick):
            forward = [chunk for chunk in action or () if chunk.part == "F"]
            backward = [chunk for chunk in action or () if chunk.part != "F"]
            for chunks in filter(None, (forward, backward)):
                direction = schedule.direction(chunks[0].micro_batch)
                part = PARTS.index("".join(chunk.part for chunk in chunks))
                parts[rank, direction, part] += 1
                spent[rank] += costs[schedule.stage(rank, direction), part]
        seconds += spent.max()
    assert facts.ticks == len(ticks)
    assert {what: getattr(facts, what) for what in counts} == pytest.approx(counts)
    assert facts.parts == pytest.approx(parts)
    assert facts.seconds == pytest.approx(seconds)
    assert facts.of_stages.sum(axis=0) == pytest.approx(parts.sum(axis=(0, 1)))


@pytest.mark.parametrize(("name", "ranks", "passes"), CASES)
def test_slots_and_sends_are_those_of_the_whole_tick_table(name: ScheduleName, ranks: int, passes: int) -> None:
    table, facts = tick_table(schedule_of_step(name, ranks, passes)), schedule_facts(name, ranks, passes)
    assert SlotCounts(facts.activations, facts.kept, facts.gradients) == table.slots
    assert facts.sends == table.sends
