"""Checks the schedules at the points that the report names, and for runs of other sizes."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.errors import ConfigError
from dsv3_jax.training.schedules import REPORT_STEPS, REPORT_TOKENS, TrainingSchedule, tokens_of_run

T = 1e12
REPORT = TrainingSchedule()


def at(tokens: float, schedule: TrainingSchedule = REPORT):
    return schedule.at(tokens / REPORT_TOKENS, 0.5, full_batch=15360)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (0.02 * T, 2.2e-4),
        (5 * T, 2.2e-4),
        (9.9999 * T, 2.2e-4),
        (12.15 * T, 0.5 * (2.2e-4 + 2.2e-5)),
        (11.075 * T, 2.2e-5 + (2.2e-4 - 2.2e-5) * 0.5 * (1 + math.cos(math.pi / 4))),
        (14.3 * T, 2.2e-5),
        (14.6 * T, 2.2e-5),
        (14.632 * T, 2.2e-5),
        (14.634 * T, 7.3e-6),
        (14.8 * T, 7.3e-6),
    ],
)
def test_learning_rate_of_the_report(tokens: float, expected: float):
    assert at(tokens).learning_rate == pytest.approx(expected, rel=1e-9, abs=1e-18)


def test_the_report_warms_up_in_2000_steps():
    """Takes the steps of the report's run one by one: 2,000 steps are 28.1B tokens, because the batch grows meanwhile.

    The report gives neither the number of its steps nor how the batch grows, here linearly in the tokens.
    """
    seen = steps = 0
    while seen < REPORT_TOKENS:
        if steps in (0, 1, 1000, 1999, 2000, 2001):
            rate = REPORT.at(seen / REPORT_TOKENS, steps / REPORT_STEPS, 15360).learning_rate
            assert rate == pytest.approx(2.2e-4 * min(1.0, steps / 2000), rel=1e-9)
        share = min(1.0, seen / (0.469 * T))
        seen += round(3072 + (15360 - 3072) * share) * 4096
        steps += 1
        assert steps != 2000 or seen == 28_068_909_056
    assert steps == REPORT_STEPS


@pytest.mark.parametrize(
    ("tokens", "sequences"),
    [(0.0, 3072), (0.1 * T, 5692), (0.2345 * T, 9216), (0.468999 * T, 15360), (0.469 * T, 15360), (14 * T, 15360)],
)
def test_batch_ramp_of_the_report(tokens: float, sequences: int):
    """At 0.1T: 3072 + 12288 * 0.1 / 0.469 = 5692.06."""
    assert at(tokens).batch_size == sequences


def test_balance_and_mtp_weights_of_the_report():
    assert [at(x * T).bias_update_speed for x in (0, 10, 14.29, 14.31, 14.8)] == [0.001, 0.001, 0.001, 0.0, 0.0]
    assert [at(x * T).mtp_weight for x in (0, 9.99, 10.01, 14.8)] == [0.3, 0.3, 0.1, 0.1]
    assert {at(x * T).balance_weight for x in (0, 5, 14.8)} == {1e-4}


def test_every_value_has_a_field_and_an_end_of_its_own():
    """Gives every field another value than the report's, so that none can stand for another."""
    schedule = TrainingSchedule(
        learning_rate=1.0,
        warmup_until=0.2,
        constant_until=0.3,
        cosine_until=0.5,
        cosine_to=0.4,
        final_until=0.7,
        last_rate=0.05,
        ramp_until=0.0,
        bias_update_speed=0.01,
        bias_update_until=0.6,
        balance_weight=0.02,
        mtp_weight=0.9,
        mtp_weight_until=0.8,
        mtp_weight_after=0.7,
    )
    for progress in np.arange(0, 101) / 100:
        values = schedule.at(progress, 1.0, full_batch=8)
        cosine = 0.4 + 0.6 * (1 + math.cos(math.pi * (progress - 0.3) / 0.2)) / 2
        rates = [1.0, cosine, 0.4, 0.05]
        assert values.learning_rate == pytest.approx(rates[np.searchsorted([0.3, 0.5, 0.7], progress, "right")])
        assert schedule.rate_at(progress, 0.05) == pytest.approx(0.25)
        assert values.bias_update_speed == (0.01 if progress < 0.6 else 0.0)
        assert values.mtp_weight == (0.9 if progress < 0.8 else 0.7)
        assert values.balance_weight == 0.02
        assert values.batch_size == 8


def test_scales_to_another_peak_and_keeps_its_shape():
    short = dataclasses.replace(REPORT, learning_rate=3e-3)
    for progress in (0.001, 0.3, 0.8, 0.97, 0.999):
        assert short.rate_at(progress, 0.5) / REPORT.rate_at(progress, 0.5) == pytest.approx(3e-3 / 2.2e-4)


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 1), st.integers(1, 4), st.integers(1, 64))
def test_a_batch_is_whole_passes_within_the_full_batch(progress: float, passes: int, rows: int):
    full = passes * rows
    schedule = TrainingSchedule(ramp_until=0.8, ramp_from=0.3)
    size = schedule.batch_at(progress, full, rows)
    assert size % rows == 0
    assert rows <= size <= full
    linear = np.interp(progress, [0, 0.8], [0.3 * full, full])
    assert abs(size - linear) <= rows / 2 or size == rows


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
