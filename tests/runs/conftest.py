"""Runs that the tests of this folder share: one of six steps that was never interrupted, and one of random weights."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from small_models import small_model
from small_runs import small_run, write_corpus

from dsv3_jax.data import Tokenizer
from dsv3_jax.data.tokenizer_training import byte_tokenizer
from dsv3_jax.runs import loop
from dsv3_jax.runs.checkpoints import Checkpoints
from dsv3_jax.runs.folder import RunFolder
from dsv3_jax.runs.loop import train
from dsv3_jax.runs.saved_run import RunPosition
from dsv3_jax.runs.starting_state import untrained_state
from dsv3_jax.training.config import RunConfig


@pytest.fixture(scope="package")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Returns a run of six steps that evaluates and saves a checkpoint every second step."""
    return small_run(write_corpus(tmp_path_factory.mktemp("corpus")), evaluate_every=2)


@pytest.fixture(scope="package", autouse=True)
def traced_once() -> Iterator[None]:
    """Lets runs of one configuration share their traced steps, since most of a run's time is tracing."""
    steps: dict[tuple[str, str], Callable] = {}

    def sharing(name: str, make: Callable) -> Callable:
        def made(skeleton, config: RunConfig, *layout) -> Callable:
            key = name, repr(config)
            if key not in steps:
                steps[key] = make(skeleton, config, *layout)
            return steps[key]

        return made

    with pytest.MonkeyPatch.context() as patch:
        for name in ("make_train_step", "make_evaluation_step"):
            patch.setattr(loop, name, sharing(name, getattr(loop, name)))
        yield


@pytest.fixture(scope="package")
def uninterrupted(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a run that was never interrupted."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert train(config, folder).exit_code == 0
    return folder


@pytest.fixture
def copy(uninterrupted: Path, tmp_path: Path) -> Path:
    """Returns a copy of the finished run, to damage."""
    return shutil.copytree(uninterrupted, tmp_path / "run")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a run that holds random weights."""
    folder = RunFolder(tmp_path_factory.mktemp("source") / "run")
    folder.path.mkdir()
    config = small_run(ema_decay=0.0)
    layers = {"num_hidden_layers": 1, "first_k_dense_replace": 0, "num_nextn_predict_layers": 0}
    config = dataclasses.replace(config, model=config.model.replace(initializer_range=0.1, **layers))
    tokenizer = Tokenizer(byte_tokenizer())
    tokenizer.save(folder.tokenizer)
    folder.write_config(config)
    checkpoints = Checkpoints(folder, tokenizer, keep=1)
    state = untrained_state(small_model(config.model, 0), config)
    checkpoints.save(state, RunPosition(step=0, tokens=0, data={}), config)
    checkpoints.close()
    return folder.path
