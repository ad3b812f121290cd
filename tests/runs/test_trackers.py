"""Checks the trackers of experiments: what is recorded, that a resumed run goes on, and what is missing."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest
from small_runs import small_run

from dsv3_jax.errors import UserError
from dsv3_jax.runs.folder import RunFolder
from dsv3_jax.runs.trackers import open_tracker

RECORDS = [{"step": 1, "main_loss": 2.5, "tokens": 128}, {"step": 2, "main_loss": 2.25, "tokens": 256}]


class Library:
    """Stands for the module of a tracker and for the run that its `init` returns; keeps what it is called with."""

    def __init__(self) -> None:
        self.started: list[dict[str, Any]] = []
        self.logged: list[tuple[dict[str, Any], int]] = []
        self.finished = 0

    def init(self, **arguments: Any) -> Library:
        self.started.append(arguments)
        return self

    def log(self, numbers: dict[str, Any], *, step: int) -> None:
        self.logged.append((numbers, step))

    def finish(self) -> None:
        self.finished += 1


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_numbers_reach_the_library(name: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library()
    monkeypatch.setitem(sys.modules, name, library)
    monkeypatch.setenv(f"{name.upper()}_PROJECT", "mine")
    config = small_run()
    for _ in range(2):  # the second time as a resumed run does
        tracker = open_tracker(name, RunFolder(tmp_path), config, 0)
        for record in RECORDS:
            tracker.write(record)
        tracker.flush()
        tracker.close()
    first, second = library.started
    assert first == second, "a resumed run goes on under the same identity"
    assert (first["project"], first["resume"], first["config"]) == ("mine", "allow", config.to_dict())
    assert library.logged[:2] == [
        ({"main_loss": 2.5, "tokens": 128}, 1),
        ({"main_loss": 2.25, "tokens": 256}, 2),
    ]
    assert library.finished == 2


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_library_that_is_absent_or_refuses_is_one_line(
    name: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"pip install {name}, or dsv3-jax\[{name}\]"):
        open_tracker(name, RunFolder(tmp_path), small_run(), 0)
    library = Library()
    monkeypatch.setattr(library, "init", lambda **_: 1 / 0)
    monkeypatch.setitem(sys.modules, name, library)
    with pytest.raises(UserError, match=f"{name} does not start: division by zero"):
        open_tracker(name, RunFolder(tmp_path), small_run(), 0)


def test_none_writes_nothing_and_tensorboard_its_folder(tmp_path: Path) -> None:
    for name in ("none", "tensorboard"):
        assert not list(tmp_path.iterdir())
        tracker = open_tracker(name, RunFolder(tmp_path), small_run(), 0)
        tracker.write(RECORDS[0])
        tracker.flush()
        tracker.close()
    assert [path.name for path in tmp_path.iterdir()] == ["tensorboard"]


@pytest.mark.timeout(120)
def test_wandb_itself_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an account and without a network it writes a file that holds the numbers."""
    pytest.importorskip("wandb", reason="wandb comes with the extra `wandb`")
    for variable, value in (("WANDB_MODE", "offline"), ("WANDB_SILENT", "true"), ("WANDB_CONSOLE", "off")):
        monkeypatch.setenv(variable, value)
    tracker = open_tracker("wandb", RunFolder(tmp_path), small_run(), 0)
    for record in RECORDS:
        tracker.write(record)
    tracker.close()
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    until = time.monotonic() + 60  # a process of wandb's own writes the file
    while b"2.25" not in (content := file.read_bytes()) and time.monotonic() < until:
        time.sleep(0.1)
    assert b"main_loss" in content
    assert b"2.25" in content


@pytest.mark.timeout(120)
def test_trackio_itself_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes a database of its own, to which a resumed run adds."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio", reason="trackio comes with the extra `trackio`")
    run = RunFolder(tmp_path / "run")
    for first in (0, 2):
        tracker = open_tracker("trackio", run, small_run(), first)
        for record in RECORDS:
            tracker.write(record | {"step": first + record["step"]})
        tracker.close()
    (name,) = trackio.Api().runs("dsv3-jax")
    assert str(name.name) == str(run.path)
