"""What a checkpoint holds beside its arrays, and the choice of the newest checkpoint that can be used."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsv3_jax.bounded_json import read_object
from dsv3_jax.data import Tokenizer
from dsv3_jax.errors import UserError
from dsv3_jax.runs.agreement import any_process, is_first, share
from dsv3_jax.runs.folder import RunFolder, read_config_file
from dsv3_jax.runs.manifest import find_damage
from dsv3_jax.training.config import RunConfig

_LARGEST_POSITION = 1_000_000  # bytes of run.json
_LOOKS = 20  # at a folder whose checkpoints are deleted while they are read


class DamagedCheckpoint(UserError):
    """A checkpoint cannot be used, although its digests are right or before they were compared."""


@dataclasses.dataclass(frozen=True)
class RunPosition:
    """How far a run has come. It is saved as run.json next to the arrays.

    Attributes:
      step: steps taken, including those whose update was skipped.
      tokens: tokens seen.
      data: state of the data iterator (`TrainIterator.state`).
      validation_at_start: result on the validation set before the first step of the run; None before it is known.
    """

    step: int
    tokens: int
    data: dict[str, Any]
    validation_at_start: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.step, int) and isinstance(self.tokens, int) and isinstance(self.data, dict)):
            raise TypeError("step and tokens are whole numbers, and data is an object")


@dataclasses.dataclass(frozen=True)
class SavedRun:
    """A checkpoint without its arrays. All of it is covered by the digests of the checkpoint.

    Attributes:
      path: folder of the checkpoint.
      position: how far the run had come.
      config: configuration of the run.
      tokenizer: tokenizer of the run.
    """

    path: Path
    position: RunPosition
    config: RunConfig
    tokenizer: Tokenizer


def list_checkpoints(folder: RunFolder) -> list[Path]:
    """Returns the complete checkpoints, oldest first."""
    try:
        found = [path for path in folder.checkpoints.iterdir() if re.fullmatch(r"[0-9]{8,18}", path.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"{folder.checkpoints} cannot be read: {error.strerror}") from error
    return sorted(found, key=lambda path: int(path.name))


def use_newest[T](
    folder: RunFolder, report: Callable[[str], None], use: Callable[[SavedRun], T], step: int | None = None
) -> T | None:
    """Calls `use` with the newest checkpoint that is undamaged and returns its result; None where there is none.

    All processes of a run call this together. Where `use` raises DamagedCheckpoint on any of them, the checkpoint
    before is tried. A checkpoint that was deleted meanwhile, as a training run does with old ones, is passed over.

    Args:
      report: is called, on the first process, with a line about each checkpoint that cannot be used.
      step: the only checkpoint that may be used.

    Raises:
      UserError: there are checkpoints, but none can be used, or none of `step`.
    """
    damaged: set[str] = set()
    for _ in range(_LOOKS):
        name = share(lambda: _newest_undamaged(folder, damaged, report) if step is None else _of_step(folder, step))
        if not name:
            return None
        path = folder.checkpoints / name
        found, problem = [], None
        try:
            found.append(use(_read(path)))
        except DamagedCheckpoint as error:
            if step is not None:
                raise UserError(f"checkpoint {path} cannot be used: {error}") from error
            problem = error
        if not any_process(problem is not None):
            return found[0]
        if is_first():
            _note_damage(folder, path, damaged, report, str(problem or "another process cannot read it"))
    raise UserError(f"the checkpoints in {folder.checkpoints} are deleted while they are read; try again")


def _newest_undamaged(folder: RunFolder, damaged: set[str], report: Callable[[str], None]) -> str:
    """Returns the name of the newest checkpoint whose digests are right; the empty string where there is none.

    Args:
      damaged: names of checkpoints that cannot be used; those found here are added.
    """
    while left := [path for path in list_checkpoints(folder) if path.name not in damaged]:
        damage = find_damage(left[-1])
        if damage is None:
            return left[-1].name
        _note_damage(folder, left[-1], damaged, report, damage)
    if list_checkpoints(folder):
        raise UserError(f"all checkpoints in {folder.checkpoints} are damaged; start a new run with another --out")
    return ""


def _of_step(folder: RunFolder, step: int) -> str:
    """Returns the name of the checkpoint of a step."""
    present = {int(path.name): path for path in list_checkpoints(folder)}
    if step not in present:
        steps = ", ".join(map(str, present)) or "none"
        raise UserError(f"{folder.path} has no checkpoint of step {step}; its checkpoints: {steps}")
    if damage := find_damage(present[step]):
        raise UserError(f"checkpoint {present[step]} cannot be used: {damage}")
    return present[step].name


def _note_damage(folder: RunFolder, path: Path, damaged: set[str], report: Callable[[str], None], reason: str) -> None:
    if not os.path.lexists(path):  # deleted, not damaged
        return
    damaged.add(path.name)
    before = [other.name for other in list_checkpoints(folder) if int(other.name) < int(path.name)]
    rest = f"; trying the one before it, {before[-1]}" if before else ""
    report(f"checkpoint {path} cannot be used: {reason}{rest}")


def _read(path: Path) -> SavedRun:
    """Reads what a checkpoint holds beside its arrays.

    Raises:
      DamagedCheckpoint: a file is missing or is not what was saved.
    """
    try:
        position = RunPosition(**read_object(path / "run.json", max_bytes=_LARGEST_POSITION))
        config = read_config_file(path / "config.json")
        tokenizer = Tokenizer.load(path / "tokenizer", verified=True)
    except (UserError, OSError, TypeError) as error:
        raise DamagedCheckpoint(" ".join(str(error).split())) from error
    if position.step != int(path.name):
        raise DamagedCheckpoint(f"run.json is of step {position.step}")
    if tokenizer.vocab_size > config.model.vocab_size:
        raise DamagedCheckpoint(
            f"its tokenizer has {tokenizer.vocab_size} ids, more than the model's {config.model.vocab_size}"
        )
    return SavedRun(path, position, config, tokenizer)
