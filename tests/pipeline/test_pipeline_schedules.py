"""Checks pipeline schedules against their rules, and against table 2 of the report, which a simulation reproduces."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from dsv3_jax.errors import ConfigError
from dsv3_jax.pipeline.schedules import Chunk, make_schedule
from dsv3_jax.pipeline.simulation import (
    Durations,
    published_bubble,
    schedule_figures,
    simulate,
    text_picture,
)

NAMES = ("1f1b", "zb1p", "dualpipe")
SIZES = [(2, 4), (2, 10), (4, 8), (4, 14), (8, 16), (16, 32), (16, 60)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("ranks", "micro_batches"), SIZES)
def test_every_chunk_once_and_in_order(name, ranks, micro_batches):
    schedule = make_schedule(name, ranks, micro_batches)
    every = sorted(Chunk(part, m) for part in ("F", "I", "W") for m in range(micro_batches))
    for program in schedule.programs:
        assert sorted(itertools.chain(*program)) == every
    timeline = simulate(schedule, Durations().of)
    start, end = {}, {}
    for rank, actions in enumerate(timeline.ranks):
        assert all(a.end <= b.start for a, b in itertools.pairwise(actions))
        for timed in actions:
            for chunk in timed.action:
                start[rank, chunk], end[rank, chunk] = timed.start, timed.end
    for m in range(micro_batches):
        route = range(ranks) if schedule.direction(m) == 0 else range(ranks - 1, -1, -1)
        for before, after in itertools.pairwise(route):
            assert end[before, Chunk("F", m)] <= start[after, Chunk("F", m)]
            assert end[after, Chunk("I", m)] <= start[before, Chunk("I", m)]
        for rank in range(ranks):
            assert end[rank, Chunk("F", m)] <= start[rank, Chunk("I", m)]
            assert start[rank, Chunk("I", m)] <= start[rank, Chunk("W", m)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("ranks", "micro_batches"), SIZES)
@pytest.mark.parametrize("durations", [Durations(), Durations(2, 4, 2, 5), Durations(3, 4, 2, 6)])
def test_table_2(name, ranks, micro_batches, durations):
    figures = schedule_figures(name, ranks, micro_batches, durations)
    if name != "dualpipe" or durations.forward == durations.weights:  # its formula takes F = W = B / 2
        assert figures.bubble == pytest.approx(published_bubble(name, ranks, durations))
    assert figures.parameter_copies == (2 if name == "dualpipe" else 1)
    assert figures.activations == (ranks + 1 if name == "dualpipe" else ranks)
    assert figures.held_for_weights == figures.activations


def test_ranks_that_wait_forever_are_refused():
    schedule = make_schedule("1f1b", 2, 4)
    first, second = schedule.programs
    backwards = dataclasses.replace(schedule, programs=(first[::-1], second))
    with pytest.raises(ValueError, match="waits forever"):
        simulate(backwards, Durations().of)


@pytest.mark.parametrize(
    ("name", "ranks", "micro_batches", "message"),
    [
        ("dualpipe", 3, 8, "even number of stages"),
        ("dualpipe", 4, 6, "at least twice"),
        ("dualpipe", 4, 9, "even number of micro-batches"),
        ("zb1p", 4, 3, "at least as many"),
        ("gpipe", 4, 3, "choose of"),
        ("1f1b", 0, 3, "needs stages"),
    ],
)
def test_a_schedule_that_does_not_exist_is_refused(name, ranks, micro_batches, message):
    with pytest.raises(ConfigError, match=message):
        make_schedule(name, ranks, micro_batches)


def test_picture_in_text():
    picture = text_picture(simulate(make_schedule("1f1b", 2, 2), Durations().of))
    assert picture.splitlines() == [
        "rank  0 |F0 F1 ......B0--- ...B1--- |",
        "rank  1 |...F0 B0--- F1 B1--- ......|",
    ]
    with pytest.raises(ValueError, match="unit"):
        text_picture(simulate(make_schedule("1f1b", 2, 2), Durations().of), unit=5)
