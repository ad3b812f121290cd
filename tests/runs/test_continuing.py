"""Checks that a run can go on from a checkpoint of another: the same steps follow, or more, or other data."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_runs import assert_trees_equal, final_state, small_run, write_corpus

from dsv3_jax.errors import UserError
from dsv3_jax.runs.checkpoints import load_checkpoint
from dsv3_jax.runs.folder import RunFolder
from dsv3_jax.runs.loop import train
from dsv3_jax.runs.metrics import read_metrics
from dsv3_jax.runs.saved_run import list_checkpoints
from dsv3_jax.runs.start import Continuation
from dsv3_jax.training.config import RunConfig

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, RunConfig]:
    """Returns a finished run of six steps with checkpoints of steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("source")
    config = small_run(write_corpus(folder / "corpus"))
    assert train(config, folder / "run").exit_code == 0
    return RunFolder(folder / "run"), config


def changed(config: RunConfig, **training: Any) -> RunConfig:
    return dataclasses.replace(config, training=dataclasses.replace(config.training, **training))


def test_the_same_steps_follow(source: tuple[RunFolder, RunConfig], tmp_path: Path):
    run, config = source
    assert train(config, tmp_path, continuation=Continuation(run, 4)).exit_code == 0
    (state, position), (expected, expected_position) = (final_state(path, config) for path in (tmp_path, run.path))
    assert_trees_equal(state, expected)
    assert position == expected_position
    assert [int(path.name) for path in list_checkpoints(RunFolder(tmp_path))] == [4, 6], "its start is kept at once"
    assert [record["step"] for record in read_metrics(RunFolder(tmp_path).metrics)] == [5, 6, 6]


def test_a_run_goes_on_longer_with_other_texts(source: tuple[RunFolder, RunConfig], tmp_path: Path):
    run, config = source
    longer = changed(config, steps=8, checkpoint_every=1)
    longer = dataclasses.replace(
        longer, data=dataclasses.replace(longer.data, corpus=str(write_corpus(tmp_path / "other", documents=30)))
    )
    assert train(longer, tmp_path / "run", continuation=Continuation(run)).exit_code == 0
    _, position = final_state(tmp_path / "run", longer, step=8)
    assert (position.step, position.data["rows_taken"]) == (8, 8)  # two steps of four rows, from the first row on
    assert position.validation_at_start is None
    assert train(longer, tmp_path / "run").exit_code == 0  # an interrupted one would go on in its own folder


@pytest.mark.parametrize(
    ("step", "training", "named"),
    [
        (3, {}, "no checkpoint of step 3; its checkpoints: 2, 4, 6"),
        (None, {}, "has taken all of the 6 steps: give a larger --steps"),
        (2, {"moment_dtype": "bfloat16"}, "training.moment_dtype = 'float32', not 'bfloat16'"),
        (2, {"ema_decay": 0.0}, "training.ema_decay above 0 = True, not False"),
    ],
)
def test_what_cannot_go_on_is_one_line(
    source: tuple[RunFolder, RunConfig], tmp_path: Path, step: int | None, training: dict[str, Any], named: str
):
    run, config = source
    with pytest.raises(UserError) as error:
        train(changed(config, **training), tmp_path / "run", continuation=Continuation(run, step))
    assert named in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_is_loaded_by_its_step(source: tuple[RunFolder, RunConfig]):
    run, config = source
    weights = []
    for step in (2, 4):
        model, _, found = load_checkpoint(run.path, step=step)
        assert found == step
        state, _ = final_state(run.path, config, step=step)
        assert state.average is not None
        weights.append(np.asarray(model.embedding.weight[...]))
        np.testing.assert_array_equal(weights[-1], np.asarray(state.average["embedding"]["weight"][...]))
    assert (weights[0] != weights[1]).any()
