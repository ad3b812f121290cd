"""A run that takes seconds, for tests of training: its configuration, corpus, and one compiled step shared by all."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from small_models import small_model

from dsv3_jax.config import ModelConfig
from dsv3_jax.data import DataConfig
from dsv3_jax.runs.checkpoints import make_model, restore
from dsv3_jax.runs.folder import RunFolder
from dsv3_jax.runs.saved_run import RunPosition
from dsv3_jax.training.config import RunConfig, TrainingConfig
from dsv3_jax.training.schedules import TrainingSchedule
from dsv3_jax.training.state import Skeleton, TrainState, new_state
from dsv3_jax.training.step import StepSettings, TrainStep, make_train_step

VOCABULARY = 266  # 256 bytes and ten special tokens
LENGTH = 32
SETTINGS = StepSettings(
    learning_rate=jnp.float32(1e-2),
    bias_update_speed=jnp.float32(1e-3),
    balance_weight=jnp.float32(1e-2),
    mtp_weight=jnp.float32(0.3),
)


def write_corpus(folder: Path, documents: int = 24) -> Path:
    """Writes texts that differ from each other, from a fixed seed."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "return", "import", "lambda", "yield", "é", "数"]
    for number in range(documents):
        text = " ".join(random.choice(words, 60).tolist())
        (folder / f"text{number:02d}.txt").write_text(f"{number}: {text}\n", encoding="utf-8")
    return folder


def small_run(corpus: Path | str = "unused", **training: Any) -> RunConfig:
    """Returns a run of six steps, each of two passes of two rows of 32 bytes; it saves every second step."""
    values: dict[str, Any] = {
        "steps": 6,
        "batch_size": 4,
        "micro_batch_size": 2,
        "schedule": TrainingSchedule(learning_rate=1e-2, warmup_until=0.2, ramp_until=0.0, ramp_from=1.0),
        "log_every": 1,
        "checkpoint_every": 2,
        "sample_tokens": 0,
    }
    return RunConfig(
        preset="tiny",
        model=ModelConfig.preset("tiny", vocab_size=VOCABULARY, num_hidden_layers=2),
        data=DataConfig(
            corpus=str(corpus),
            tokenizer="byte",
            vocab_size=VOCABULARY,
            sequence_length=LENGTH,
            validation_fraction=0.2,
            validation_sequences=4,
        ),
        training=TrainingConfig(**(values | training)),
        precision="float32",
    )


def random_batch(seed: int, passes: int, rows: int, *, padded: bool = False) -> tuple[jax.Array, jax.Array]:
    """Returns tokens and segment ids [A, B, T+1]; with `padded`, rows end in padding of different lengths."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, VOCABULARY, (passes, rows, LENGTH + 1))
    segments = np.ones_like(tokens)
    if padded:
        for row in segments.reshape(-1, LENGTH + 1):
            row[random.integers(4, LENGTH + 2) :] = 0
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(segments, jnp.int32)


def packed_batch(seed: int, passes: int, rows: int) -> tuple[jax.Array, jax.Array]:
    """Returns tokens and segment ids [A, B, T+1] of packed samples, each a prompt that is read only and an answer."""
    random = np.random.default_rng(seed)
    tokens, segments = (np.array(array) for array in random_batch(seed, passes, rows))
    for row in segments.reshape(-1, LENGTH + 1):
        cuts = np.sort(random.choice(np.arange(1, LENGTH + 1), 7, replace=False))
        row[:] = 0  # behind the last cut
        for sample, (start, middle, end) in enumerate(
            zip([0, *cuts[1::2]], cuts[::2], cuts[1::2], strict=False), start=1
        ):
            row[start:middle], row[middle:end] = -sample, sample
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(segments, jnp.int32)


def batch_of_pairs(seed: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens and segment ids [rows, T + 1] of two pairs a row, one in the last row; parts of them read only."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, VOCABULARY, (rows, LENGTH + 1))
    segments = np.zeros_like(tokens)
    for row, ids in enumerate(segments):
        cuts = np.sort(random.choice(np.arange(2, LENGTH), 4, replace=False))
        for number, (start, stop) in enumerate(zip([0, *cuts], cuts, strict=False), start=1):
            if row < rows - 1 or number <= 2:
                ids[start:stop] = number * random.choice([-1, 1], stop - start)
    return tokens.astype(np.int32), segments.astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Start:
    """A model before its first step. `step` donates its state: give it a copy (`fresh`)."""

    config: RunConfig
    skeleton: Skeleton
    state: TrainState
    step: TrainStep

    def fresh(self) -> TrainState:
        """Returns a copy that may be donated."""
        return jax.tree.map(jnp.copy, self.state)


@functools.cache
def small_start() -> Start:
    """Returns the small run's initial state, with router biases other than zero, and its compiled step."""
    config = small_run()
    skeleton, state = new_state(small_model(config.model, config.training.seed), config)
    biases = 0.01 * jax.random.normal(jax.random.key(5), state.router_biases.shape)
    state = dataclasses.replace(state, router_biases=biases)
    return Start(config, skeleton, state, make_train_step(skeleton, config))


def assert_trees_equal(left: Any, right: Any) -> None:
    """Checks that two trees are equal bit for bit, random keys included."""
    paths_left, paths_right = (jax.tree_util.tree_leaves_with_path(tree) for tree in (left, right))
    assert len(paths_left) == len(paths_right)
    for (path, a), (_, b) in zip(paths_left, paths_right, strict=True):
        a, b = (jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in (a, b))
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=jax.tree_util.keystr(path))


def final_state(folder: Path, config: RunConfig, step: int = 6) -> tuple[TrainState, RunPosition]:
    """Returns state and position in the checkpoint of a step."""
    path = RunFolder(folder).checkpoints / f"{step:08d}"
    _, state = restore(path, config, lambda: make_model(config))
    return state, RunPosition(**json.loads((path / "run.json").read_text()))
