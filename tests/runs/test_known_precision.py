"""Checks that a new run finds out its precision, and that a run which goes on keeps what it has."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from small_runs import small_run

from dsv3_jax.precision.automatic import Choice
from dsv3_jax.runs import start
from dsv3_jax.runs.folder import RunFolder
from dsv3_jax.runs.start import Continuation, with_known_precision

AUTO = dataclasses.replace(small_run(), precision="auto")


@pytest.fixture(autouse=True)
def found(monkeypatch: pytest.MonkeyPatch):
    """Lets the machine be one that is fast in bfloat16."""
    monkeypatch.setattr(start, "automatic_recipe", lambda width: Choice("bfloat16", "it is fast"))


def run_of(path: Path, precision: str) -> RunFolder:
    path.mkdir()
    folder = RunFolder(path)
    folder.write_config(dataclasses.replace(small_run(), precision=precision))
    return folder


def test_a_new_run_says_what_it_found(tmp_path: Path):
    config, said = with_known_precision(AUTO, RunFolder(tmp_path), None)
    assert config.precision == "bfloat16"
    assert said.startswith("precision auto is bfloat16 here: it is fast")


@pytest.mark.parametrize("precision", ["float32", "fp8"])
def test_a_run_that_goes_on_keeps_its_precision(tmp_path: Path, precision: str):
    folder, elsewhere = run_of(tmp_path / "run", precision), RunFolder(tmp_path / "new")
    assert with_known_precision(AUTO, folder, None)[0].precision == precision
    assert with_known_precision(AUTO, elsewhere, Continuation(folder))[0].precision == precision


def test_a_named_precision_stays(tmp_path: Path):
    named = dataclasses.replace(AUTO, precision="float32")
    assert with_known_precision(named, RunFolder(tmp_path), None)[0] is named
