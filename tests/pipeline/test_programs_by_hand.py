"""Checks whole programs of ranks against ones written by hand, and what every rank holds, not the busiest alone."""

from __future__ import annotations

import pytest

from dsv3_jax.pipeline.schedules import Chunk, make_schedule
from dsv3_jax.pipeline.simulation import Durations, Timed, Timeline, label, schedule_figures, simulate

ZERO_BUBBLE = [  # W is delayed by one micro-batch more on every next rank
    "F0 F1 F2 F3 I0 W0 F4 I1 W1 F5 I2 W2 I3 W3 I4 W4 I5 W5",
    "F0 F1 F2 I0 F3 I1 W0 F4 I2 W1 F5 I3 W2 I4 W3 I5 W4 W5",
    "F0 F1 I0 F2 I1 F3 I2 W0 F4 I3 W1 F5 I4 W2 I5 W3 W4 W5",
    "F0 I0 F1 I1 F2 I2 F3 I3 W0 F4 I4 W1 F5 I5 W2 W3 W4 W5",
]
# Figure 5 of the report, whose second half mirrors the first: 8 ranks, of which these are 0, 2 and 3.
DUALPIPE = {
    0: "F0 F1 F2 F3 F4 F5 F6 F10 I10 W10 F11 I11 W11 F12 I12 W12 F13 F7B13 F14B0 F8B14 F15B1 F9B15 F16B2 B16 F17B3 B17 "
    "F18B4 B18 F19B5 B19 I6 W6 I7 W7 I8 W8 I9 W9",
    2: "F0 F1 F2 F10 F3 F11 F4 F12 I10 W10 F13 F5B11 F14B0 F6B12 F15B1 F7B13 F16B2 F8B14 F17B3 F9B15 F18B4 B16 F19B5 "
    "B17 B6 B18 I7 I19 I8 W7 I9 W19 W8 W9",
    3: "F0 F10 F1 F11 F2 F12 F3 F13 F4 B10 F14B0 F5B11 F15B1 F6B12 F16B2 F7B13 F17B3 F8B14 F18B4 F9B15 F19B5 B16 B6 "
    "B17 B7 I18 I8 I19 I9 W18 W8 W19 W9",
}


def program(schedule, rank: int) -> str:
    return " ".join(label(action) for action in schedule.programs[rank])


def test_zero_bubble_of_four_ranks() -> None:
    schedule = make_schedule("zb1p", 4, 6)
    assert [program(schedule, rank) for rank in range(4)] == ZERO_BUBBLE


@pytest.mark.parametrize("rank", DUALPIPE)
def test_dualpipe_is_figure_5(rank: int) -> None:
    schedule = make_schedule("dualpipe", 8, 20)
    assert program(schedule, rank) == DUALPIPE[rank]
    mirrored = [
        tuple(chunk._replace(micro_batch=(chunk.micro_batch + 10) % 20) for chunk in action)
        for action in schedule.programs[7 - rank]
    ]
    assert list(schedule.programs[rank]) == mirrored


@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 4), (4, 10), (8, 20), (16, 32)])
def test_activations_of_every_rank(ranks: int, micro_batches: int) -> None:
    """1F1B holds one micro-batch less on every next rank; ZB1P too, but `ranks` until W is done; DualPipe PP + 1."""
    falling = list(range(ranks, 0, -1))
    held = {
        "1f1b": (falling, falling),
        "zb1p": (falling, [ranks] * ranks),
        "dualpipe": ([ranks + 1] * ranks, [ranks + 1] * ranks),
    }
    for name, (activations, for_weights) in held.items():
        timeline = simulate(make_schedule(name, ranks, micro_batches), Durations().of)  # pyright: ignore
        assert timeline.peak_activations() == activations
        assert timeline.peak_held_for_weights() == for_weights


def test_what_a_split_backward_pass_releases_first() -> None:
    """Two micro-batches are held from the second F on, though the first I comes before the second W."""
    schedule = make_schedule("zb1p", 2, 2)
    assert program(schedule, 1) == "F0 I0 F1 I1 W0 W1"
    timeline = simulate(schedule, Durations().of)
    assert timeline.peak_activations() == [2, 1]
    assert timeline.peak_held_for_weights() == [2, 2]


def test_figures_of_a_schedule_by_hand() -> None:
    """1F1B on 2 ranks with F = 1 and B = 2: 3 (2 micro-batches + 1 of bubble) = 9, of which 3 are idle."""
    figures = schedule_figures("1f1b", 2, 2)
    assert (figures.total, figures.bubble) == (9, 3)
    assert figures.bubble_fraction == pytest.approx(1 / 3)


def test_the_fewest_micro_batches_are_allowed() -> None:
    for name, fewest in (("1f1b", 1), ("zb1p", 4), ("dualpipe", 8)):
        assert make_schedule(name, 4, fewest).micro_batches == fewest  # pyright: ignore


def test_an_overlapped_pair_holds_both_of_its_micro_batches() -> None:
    """The forward pass of one runs while the backward pass of the other still needs its activations."""
    first, pair = (Chunk("F", 0),), (Chunk("F", 1), Chunk("I", 0), Chunk("W", 0))
    timeline = Timeline(((Timed(first, 0, 1), Timed(pair, 1, 4)),), 4)
    assert timeline.peak_activations() == timeline.peak_held_for_weights() == [2]
