"""Checks what the speedrun reads from a run's files, and the line that it makes of it."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dsv3_jax import default_run
from dsv3_jax.errors import UserError
from dsv3_jax.runs.folder import RunFolder

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture
def speedrun(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    return importlib.import_module("speedrun")


def records(*bits: float) -> list[dict[str, Any]]:
    """Returns the records of a run that trains on 100 tokens in 0.5 s, then 0.25 s, ... and evaluates after each."""
    found: list[dict[str, Any]] = [{"step": 0, "validation_bits_per_byte": 8.0}]
    for step, value in enumerate(bits, start=1):
        found.append({"step": step, "tokens": 100 * step, "tokens_per_second": 200.0 if step == 1 else 400.0})
        found.append({"step": step, "validation_bits_per_byte": value})
    return found


def test_the_first_evaluation_at_the_target_counts(speedrun: ModuleType):
    assert speedrun.result_of(records(3.0, 1.7, 1.6), 1.7) == speedrun.Result(1.7, 2, 200, 0.75)


def test_of_a_run_that_misses_the_target_the_best_is_shown(speedrun: ModuleType):
    assert speedrun.result_of(records(3.0, 1.8, 1.9), 1.7) == speedrun.Result(1.8, 2, 200, 0.75)


def test_a_run_without_evaluation_is_an_error(speedrun: ModuleType):
    with pytest.raises(UserError, match="not evaluated"):
        speedrun.result_of(records()[:1], 1.7)


def test_a_line_names_what_differs(speedrun: ModuleType, tmp_path: Path):
    run, folder = default_run("nano"), RunFolder(tmp_path)
    folder.write_config(
        dataclasses.replace(run, precision="bfloat16", training=dataclasses.replace(run.training, batch_size=4))
    )
    line = speedrun.line(speedrun.Result(1.65, 800, 819200, 123.4), folder, 1.7)
    cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
    assert len(cells) == speedrun.HEAD.splitlines()[-2].count("|") - 1
    assert cells[1:7] == ["1.7000", "1.6500", "123 s", "800", "819,200", "bfloat16"]
    assert cells[-1] == "training.batch_size=4"


def test_another_corpus_does_not_count(speedrun: ModuleType, tmp_path: Path):
    run, folder = default_run("nano"), RunFolder(tmp_path)
    folder.write_config(dataclasses.replace(run, data=dataclasses.replace(run.data, corpus="/some/texts")))
    with pytest.raises(UserError, match="corpus"):
        speedrun.line(speedrun.Result(1.65, 1, 1, 1.0), folder, 1.7)
