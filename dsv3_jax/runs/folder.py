"""A run's folder: its configuration, its lock, and whether a second start belongs to the same run."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsv3_jax.errors import UserError
from dsv3_jax.sharding.mesh import AXES
from dsv3_jax.training.config import RunConfig

# What may differ when a run goes on: it changes what is watched and kept, and where, not what is computed.
_FREE = {
    "training.log_every",
    "training.evaluate_every",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.max_nonfinite_steps",
    "training.sample_tokens",
    "training.loss_chunk",
    "training.rematerialisation",
    "training.zero",
    "training.overlap_exchange",
    "training.pipeline_schedule",
    "data.worker_count",
    *(f"mesh.{axis}" for axis in AXES),
}


class RunFolder:
    """Paths of a run.

    config.json, tokenizer/, metrics.jsonl, tensorboard/, checkpoints/<step>/, loss.png, expert_load.png, sample.txt,
    summary.json, cache/ (tokenised corpus) and lock.
    """

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "config.json"
        self.tokenizer = path / "tokenizer"
        self.metrics = path / "metrics.jsonl"
        self.tensorboard = path / "tensorboard"
        self.checkpoints = path / "checkpoints"
        self.loss_plot = path / "loss.png"
        self.load_plot = path / "expert_load.png"
        self.sample = path / "sample.txt"
        self.summary = path / "summary.json"
        self.cache = path / "cache"
        self.lock = path / "lock"

    @property
    def holds_run(self) -> bool:
        """Whether a run was started here."""
        return self.config.exists()

    def read_config(self) -> RunConfig:
        """The configuration of the run that was started here.

        Raises:
          UserError: there is none, or it cannot be read.
        """
        try:
            return RunConfig.from_dict(json.loads(self.config.read_text()))
        except FileNotFoundError:
            raise UserError(f"{self.path} holds no run: it has no config.json; start one with dsv3 train") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{self.config} cannot be read: {error}") from error

    def write_config(self, config: RunConfig) -> None:
        """Writes the whole resolved configuration."""
        write_atomically(self.config, json.dumps(config.to_dict(), indent=1) + "\n")

    def check_same_run(self, config: RunConfig) -> None:
        """Refuses to go on with another configuration than the run was started with.

        Raises:
          UserError: names the first field that differs, with both values.
        """
        started, wanted = _flat(self.read_config().to_dict()), _flat(config.to_dict())
        for name, value in wanted.items():
            if name not in _FREE and started.get(name) != value:
                raise UserError(
                    f"{self.path} holds a run with {name} = {started.get(name)!r}, not {value!r}: "
                    "give that value to go on with it, or another --out to start anew"
                )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps every other trainer out of the folder, which is made if need be.

        Raises:
          UserError: another process trains here, or the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.lock, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror}; choose another --out") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise UserError(
                f"{self.path} is in use by another dsv3 train; wait for it or choose another --out"
            ) from None
        try:
            yield
        finally:
            os.close(descriptor)

    @contextmanager
    def emptied_if_no_run_starts(self) -> Iterator[None]:
        """A new folder is taken away again when what is done in the block is refused."""
        ours = not self.holds_run and {entry.name for entry in self.path.iterdir()} <= {self.lock.name}
        try:
            yield
        except UserError:
            if ours and not self.holds_run:
                shutil.rmtree(self.path, ignore_errors=True)
            raise


def write_atomically(path: Path, text: str) -> None:
    """Writes a file so that a reader sees the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
