"""Checks the schedules at the points that the report names, and for runs of other sizes."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.errors import ConfigError
from dsv3_jax.training.schedules import REPORT_TOKENS, TrainingSchedule, tokens_of_run

T = 1e12
REPORT = TrainingSchedule()


def at(tokens: float):
    return REPORT.at(tokens / REPORT_TOKENS, full_batch=15360)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (0.0, 0.0),
        (1000 * 3072 * 4096, 1.1e-4),
        (2000 * 3072 * 4096, 2.2e-4),
        (5 * T, 2.2e-4),
        (9.9999 * T, 2.2e-4),
        (12.15 * T, 0.5 * (2.2e-4 + 2.2e-5)),
        (11.075 * T, 2.2e-5 + (2.2e-4 - 2.2e-5) * 0.5 * (1 + math.cos(math.pi / 4))),
        (14.3 * T, 2.2e-5),
        (14.6 * T, 2.2e-5),
        (14.634 * T, 7.3e-6),
        (14.8 * T, 7.3e-6),
    ],
)
def test_learning_rate_of_the_report(tokens: float, expected: float):
    assert at(tokens).learning_rate == pytest.approx(expected, rel=1e-9, abs=1e-18)


@pytest.mark.parametrize(
    ("tokens", "sequences"), [(0.0, 3072), (0.2345 * T, 9216), (0.469 * T, 15360), (14 * T, 15360)]
)
def test_batch_ramp_of_the_report(tokens: float, sequences: int):
    assert at(tokens).batch_size == sequences


def test_balance_and_mtp_weights_of_the_report():
    assert [at(x * T).bias_update_speed for x in (0, 10, 14.29, 14.31, 14.8)] == [0.001, 0.001, 0.001, 0.0, 0.0]
    assert [at(x * T).mtp_weight for x in (0, 9.99, 10.01, 14.8)] == [0.3, 0.3, 0.1, 0.1]
    assert {at(x * T).balance_weight for x in (0, 5, 14.8)} == {1e-4}


def test_scales_to_another_peak_and_keeps_its_shape():
    short = dataclasses.replace(REPORT, learning_rate=3e-3)
    for progress in (0.001, 0.3, 0.8, 0.97, 0.999):
        assert short.rate_at(progress) / REPORT.rate_at(progress) == pytest.approx(3e-3 / 2.2e-4)


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 1), st.integers(1, 4), st.integers(1, 64))
def test_a_batch_is_whole_passes_within_the_full_batch(progress: float, passes: int, rows: int):
    full = passes * rows
    size = REPORT.batch_at(progress, full, rows)
    assert size % rows == 0
    assert rows <= size <= full


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 8), st.floats(0.05, 1.0))
def test_tokens_of_a_run_make_exactly_its_steps(steps: int, passes: int, ramp_until: float):
    schedule = dataclasses.replace(REPORT, ramp_until=ramp_until, ramp_from=0.25)
    total = tokens_of_run(schedule, steps, passes * 2, 16, 2)
    seen = taken = 0
    while seen < total:
        seen += schedule.batch_at(seen / total, passes * 2, 2) * 16
        taken += 1
    assert taken == steps


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("warmup_until", -0.1),
        ("constant_until", 0.0001),
        ("cosine_until", 1.5),
        ("learning_rate", -1.0),
        ("learning_rate", float("nan")),
        ("mtp_weight", float("inf")),
        ("ramp_from", 0.0),
    ],
)
def test_a_wrong_schedule_names_its_field(field: str, value: float):
    with pytest.raises(ConfigError) as error:
        TrainingSchedule(**{field: value})
    assert f"schedule.{field}" in str(error.value)
