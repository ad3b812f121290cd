"""Trackers of experiments: services, or files beside the run, that show the numbers of many runs together.

dsv3 train --preset nano --out runs/nano --tracker wandb         # WANDB_MODE=offline writes below the run's folder
dsv3 train --preset nano --out runs/nano --tracker trackio       # a local database, shown by `trackio show`
dsv3 train --preset nano --out runs/nano --tracker tensorboard   # the default: files in the run's folder
"""

from __future__ import annotations

import hashlib
import importlib
import os
from pathlib import Path
from typing import Any, Protocol

from dsv3_jax.errors import UserError, reason_of
from dsv3_jax.runs.folder import RunFolder
from dsv3_jax.runs.metrics import Record, TensorBoard
from dsv3_jax.training.config import RunConfig, TrackerName

_PROJECT = "dsv3-jax"


class Tracker(Protocol):
    """What records the numbers of a run."""

    def write(self, record: Record) -> None:
        """Records the numbers of a step or of an evaluation; `record["step"]` is the step."""
        ...

    def flush(self) -> None:
        """Waits until everything is on the disk, where the tracker can."""
        ...

    def close(self) -> None:
        """Ends the recording."""
        ...


class NoTracker:
    """Records nothing."""

    def write(self, record: Record) -> None:
        """Does nothing."""

    def flush(self) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


class LibraryTracker:
    """Records in Weights & Biases or trackio, whose functions have the same names.

    A resumed run goes on under its old identity, which is made from the path of its folder. Where and how the library
    writes (offline, project, entity) is set by its own environment variables.

    Args:
      name: the library.
      folder: the run.
      config: its configuration, which is recorded too.

    Raises:
      UserError: the library is not installed, or refuses.
    """

    def __init__(self, name: TrackerName, folder: RunFolder, config: RunConfig):
        self._name = name
        path = folder.path.absolute()
        project = os.environ.get(f"{name.upper()}_PROJECT", _PROJECT)
        arguments: dict[str, Any] = {"project": project, "config": config.to_dict(), "resume": "allow"}
        if name == "wandb":
            identity = hashlib.sha256(str(path).encode()).hexdigest()[:16]
            arguments |= {"name": path.name, "id": identity, "dir": str(path)}
        else:
            arguments["name"] = str(path)
        try:
            self._run = importlib.import_module(name).init(**arguments)
        except ImportError as error:
            raise UserError(
                f"--tracker {name} needs the Python package {name}: pip install {name}, or dsv3-jax[{name}]"
            ) from error
        except Exception as error:  # each library has errors of its own: no login, no network, a full disk
            raise UserError(f"{name} does not start: {reason_of(error)}") from error

    def write(self, record: Record) -> None:
        """Records the numbers of a step or of an evaluation; `record["step"]` is the step."""
        numbers = {key: value for key, value in record.items() if key != "step"}
        self._run.log(numbers, step=record["step"])

    def flush(self) -> None:
        """Does nothing: the library writes in its own process or thread."""

    def close(self) -> None:
        """Ends the recording, which may wait for the network."""
        self._run.finish()


def open_tracker(name: TrackerName, folder: RunFolder, config: RunConfig, last_step: int) -> Tracker:
    """Returns the tracker of that name for a run.

    Args:
      last_step: the step that the run is resumed from.

    Raises:
      UserError: the tracker's library is not installed, or does not start.
    """
    match name:
        case "none":
            return NoTracker()
        case "tensorboard":
            return TensorBoard(Path(folder.tensorboard), last_step)
        case _:
            return LibraryTracker(name, folder, config)
