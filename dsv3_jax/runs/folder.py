"""The folder of a run: its files, its lock, and the check that a run is resumed with the same configuration."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsv3_jax.bounded_json import read_object
from dsv3_jax.errors import UserError, reason_of
from dsv3_jax.operating_system import lock_exclusively
from dsv3_jax.runs.run_toml import to_toml
from dsv3_jax.sharding.mesh import AXES
from dsv3_jax.training.config import RunConfig

_LARGEST_CONFIG = 1_000_000  # bytes of config.json

# Fields that may change when a run is resumed: they change what is reported and kept, and on which devices, but not
# what is computed.
_MAY_CHANGE = {
    "data.corpus",  # a corpus that was moved; its contents are compared when the rows are set to their position
    "training.log_every",
    "training.evaluate_every",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.max_nonfinite_steps",
    "training.sample_tokens",
    "training.stop_signal",
    "training.tracker",
    "training.loss_chunk",
    "training.rematerialisation",
    "training.attention",
    "training.zero",
    "training.overlap_exchange",
    "training.pipeline_schedule",
    "data.worker_count",
    *(f"mesh.{axis}" for axis in AXES),
}


class RunFolder:
    """The files of a run: config.json, run.toml (the same for users), tokenizer/, metrics.jsonl, tensorboard/,
    checkpoints/<step>/, loss.png, expert_load.png, sample.txt, summary.json, cache/ (the tokenised corpus) and lock.
    A run of reinforcement learning has grpo.json, samples/ and reward.png too.

    Args:
      path: the folder; it need not exist.
    """

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "config.json"
        self.toml = path / "run.toml"
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
        self.grpo = path / "grpo.json"
        self.samples = path / "samples"
        self.reward_plot = path / "reward.png"

    @property
    def holds_run(self) -> bool:
        """Whether the folder holds a run."""
        return self.config.exists()

    def read_config(self) -> RunConfig:
        """Reads the configuration of the run.

        Raises:
          UserError: the folder holds no run, or its configuration cannot be read.
        """
        if not self.holds_run:
            raise UserError(f"{self.path} holds no run: it has no config.json; start one with dsv3 train")
        return read_config_file(self.config)

    def write_config(self, config: RunConfig) -> None:
        """Writes the configuration of a run, as run.toml for users too."""
        write_atomically(self.toml, to_toml(config))
        write_atomically(self.config, json.dumps(config.to_dict(), indent=1) + "\n")

    def check_same_run(self, config: RunConfig) -> None:
        """Checks that `config` computes the same as the configuration the run was started with.

        Raises:
          UserError: it does not; the message names the first field that differs, with both values.
        """
        if difference := first_difference(self.read_config(), config):
            name, started, wanted = difference
            raise UserError(
                f"{self.path} holds a run with {name} = {started!r}, not {wanted!r}: "
                "give that value to resume it, or another --out to start a new run"
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Makes the folder if needed, and locks it against other training processes while the block runs.

        Raises:
          UserError: another process trains in the folder, or it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            locks = [os.open(self.lock, os.O_RDWR | os.O_CREAT), os.open(self.path, os.O_RDONLY)]
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {reason_of(error)}; choose another --out") from error
        try:
            for descriptor in locks:  # the folder too, because the file may be deleted
                try:
                    lock_exclusively(descriptor)
                except BlockingIOError:
                    raise UserError(
                        f"{self.path} is in use by another dsv3 train; wait for it or choose another --out"
                    ) from None
                except OSError as error:  # some network file systems lock files only, or nothing
                    if descriptor == locks[0]:
                        warnings.warn(
                            f"{self.lock} cannot be locked ({reason_of(error)}), so nothing keeps a second dsv3 train "
                            "out of the folder: start only one",
                            stacklevel=3,
                        )
            yield
        finally:
            for descriptor in locks:
                os.close(descriptor)

    def is_in_training(self) -> bool:
        """Returns whether another process trains in the folder now; False where the file system has no locks."""
        try:
            descriptor = os.open(self.lock, os.O_RDWR)
        except OSError:
            return False
        try:
            lock_exclusively(descriptor)
        except BlockingIOError:
            return True
        except OSError:
            return False
        finally:
            os.close(descriptor)
        return False

    @contextmanager
    def removed_if_no_run_starts(self) -> Iterator[None]:
        """Removes a folder that was new if the block fails by bad input before a run has started in it."""
        new = not self.holds_run and {entry.name for entry in self.path.iterdir()} <= {self.lock.name}
        try:
            yield
        except (UserError, OSError):
            if new and not self.holds_run:
                shutil.rmtree(self.path, ignore_errors=True)
            raise


def first_difference(ours: RunConfig, theirs: RunConfig) -> tuple[str, Any, Any] | None:
    """Returns name and both values of the first field that makes two runs compute different numbers, or None.

    A run may be made longer: `theirs` may have more steps.
    """
    for name, left, right in differences(ours.to_dict(), theirs.to_dict()):
        longer = name == "training.steps" and theirs.training.steps > ours.training.steps
        if name not in _MAY_CHANGE and not longer:
            return name, left, right
    return None


def differences(left: dict[str, Any], right: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yields the dotted name and both values of each field in which two nested dictionaries differ."""
    left, right = by_dotted_name(left), by_dotted_name(right)
    for name in (*left, *(right.keys() - left.keys())):
        if left.get(name) != right.get(name):
            yield name, left.get(name), right.get(name)


def read_config_file(path: Path) -> RunConfig:
    """Reads a configuration that was written as JSON.

    Raises:
      UserError: the file cannot be read, or is not the configuration of a run.
    """
    values = read_object(path, max_bytes=_LARGEST_CONFIG)
    try:
        return RunConfig.from_dict(values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an error of the operating system while `path` is written, such as a full disk, into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written: {reason_of(error)}") from error


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file so that a reader sees either the old content or the whole new content.

    Raises:
      UserError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        try:
            with temporary.open("wb", buffering=0) as file:
                rest = content.encode() if isinstance(content, str) else content
                while rest:
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def by_dotted_name(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the values of nested dictionaries by dotted name, such as `training.steps`."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= by_dotted_name(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found
