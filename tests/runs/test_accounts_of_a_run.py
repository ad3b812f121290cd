"""Checks the loop's accounts of a run whose steps compute nothing: batches, tokens, schedules, what is evaluated."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from small_runs import LENGTH, small_run, write_corpus

from dsv3_jax.runs import loop
from dsv3_jax.runs.metrics import read_metrics
from dsv3_jax.training.evaluation_step import EvaluationSums
from dsv3_jax.training.schedules import TrainingSchedule
from dsv3_jax.training.state import TrainState
from dsv3_jax.training.step import StepMetrics, StepSettings

SCHEDULE = TrainingSchedule(
    learning_rate=1.0,
    warmup_until=0.25,
    constant_until=0.4,
    cosine_until=0.6,
    cosine_to=0.5,
    final_until=0.8,
    last_rate=0.125,
    ramp_until=0.5,
    ramp_from=0.25,
    bias_update_until=0.7,
    mtp_weight_until=0.9,
)


def test_batches_tokens_and_schedules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs twelve steps of up to eight rows; the oracle counts tokens from the rows that each step was given."""
    config = small_run(write_corpus(tmp_path / "corpus"), steps=12, batch_size=8, micro_batch_size=2, schedule=SCHEDULE)
    given: list[tuple[int, StepSettings]] = []
    evaluated: list[Any] = []

    def fake_step(state: TrainState, tokens: Any, segment_ids: Any, settings: StepSettings) -> Any:
        assert tokens.shape[1:] == (2, LENGTH + 1)
        given.append((tokens.shape[0] * 2, jax.device_get(settings)))
        average = jax.tree.map(lambda leaf: leaf + 1, state.average)
        numbers = {field.name: np.zeros(()) for field in dataclasses.fields(StepMetrics)}
        layers = {"mtp_loss": np.zeros(1), "load": np.ones((2, 4), np.int32), "applied": np.bool_(True)}
        return dataclasses.replace(state, average=average), StepMetrics(**(numbers | layers))

    def fake_evaluation(params: Any, *_: Any) -> EvaluationSums:
        evaluated.append(params)
        return EvaluationSums(*[np.ones(2)] * 4)

    monkeypatch.setattr(loop, "make_train_step", lambda *_: fake_step)
    monkeypatch.setattr(loop, "make_evaluation_step", lambda *_: fake_evaluation)
    monkeypatch.setattr(loop, "whole_model", lambda *_: None)
    assert loop.train(config, tmp_path / "run").exit_code == 0

    # The weights that are evaluated last are the average, which has grown by one in each step.
    for first, last in zip(jax.tree.leaves(evaluated[0]), jax.tree.leaves(evaluated[-1]), strict=True):
        np.testing.assert_allclose(last, np.asarray(first) + 12, rtol=1e-6)

    records = [record for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in record]
    total, seen = LENGTH * sum(rows for rows, _ in given), 0
    assert config.total_tokens() <= total < config.total_tokens() + 8 * LENGTH
    assert len(records) == len(given) == 12
    for steps, ((rows, settings), record) in enumerate(zip(given, records, strict=True)):
        progress = seen / config.total_tokens()
        ramp = min(1.0, 0.25 + 0.75 * progress / 0.5)
        assert abs(rows - 8 * ramp) <= 1
        cosine = 0.5 + 0.5 * (1 + np.cos(np.pi * (progress - 0.4) / 0.2)) / 2
        rate = (
            [1.0, cosine, 0.5, 0.125][np.searchsorted([0.4, 0.6, 0.8], progress, "right")] if steps >= 3 else steps / 3
        )
        np.testing.assert_allclose(settings.learning_rate, rate, rtol=1e-6)
        np.testing.assert_allclose(settings.bias_update_speed, 0.001 if progress < 0.7 else 0.0)
        np.testing.assert_allclose(settings.mtp_weight, 0.3 if progress < 0.9 else 0.1)
        np.testing.assert_allclose(settings.balance_weight, 1e-4)
        seen += rows * LENGTH
        assert (record["batch_size"], record["tokens"], record["step"]) == (rows, seen, steps + 1)
        np.testing.assert_allclose(record["learning_rate"], rate, rtol=1e-6)
    assert {rows for rows, _ in given} == {2, 4, 6, 8}
    assert float(given[-1][1].learning_rate) == 0.125
