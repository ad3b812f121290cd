"""Checks that a full disk, and whatever else the system refuses, gives one line and exit code 2."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from simulated import environment

from dsv3_jax.cli.main import main
from dsv3_jax.errors import UserError, reason_of
from dsv3_jax.runs.appended_file import AppendedFile
from dsv3_jax.runs.folder import write_atomically
from dsv3_jax.runs.metrics import TensorBoard


def test_files_that_grow_say_that_the_disk_is_full(tmp_path: Path):
    (tmp_path / "full").symlink_to("/dev/full")
    file = AppendedFile(tmp_path / "full")
    with pytest.raises(UserError, match="full cannot be written: No space left on device"):
        file.write(b"a record")
    file.close()  # a buffer would fail again here


def test_a_deleted_file_is_made_again(tmp_path: Path):
    file = AppendedFile(tmp_path / "metrics.jsonl")
    file.write(b"1\n")
    (tmp_path / "metrics.jsonl").unlink()
    file.write(b"2\n")
    file.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"2\n"


def test_a_deleted_folder_is_one_line(tmp_path: Path):
    (tmp_path / "run").mkdir()
    file, board = AppendedFile(tmp_path / "run" / "metrics.jsonl"), TensorBoard(tmp_path / "run" / "tensorboard", 0)
    for path in sorted((tmp_path / "run").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (tmp_path / "run").rmdir()
    for write in (lambda: file.write(b"1\n"), lambda: board.write({"step": 1, "loss": 1.0})):
        with pytest.raises(UserError, match="cannot be written: No such file or directory"):
            write()
    with pytest.raises(UserError, match="cannot be written: No such file or directory"):
        write_atomically(tmp_path / "run" / "summary.json", "{}")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_atomically(tmp_path / "file", "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="file cannot be written: No space left on device"):
        write_atomically(tmp_path / "file", "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "old")]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError("16384 requested and 0 written"),  # numpy
        ValueError("RESOURCE_EXHAUSTED: Error writing x: Failed to write 8630 bytes: No space left on device [y]"),
    ],
)
def test_the_reason_is_the_same_whoever_reports_it(error: Exception):
    assert reason_of(error) == "No space left on device"


def test_output_that_cannot_be_written_is_one_line():
    command = [sys.executable, "-m", "dsv3_jax.cli.main", "--help"]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment(), check=False)
    assert (ended.returncode, ended.stderr) == (2, "dsv3: No space left on device\n")


def test_what_the_system_refuses_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    refusals = {
        OSError(errno.EMFILE, "Too many open files", "corpus"): "dsv3: corpus: Too many open files\n",
        MemoryError(): "dsv3: not enough memory: MemoryError; dsv3 plan estimates what a run takes\n",
    }
    for error, line in refusals.items():

        def refuse(argv: list[str], error: BaseException = error) -> int:
            raise error

        monkeypatch.setattr("dsv3_jax.cli.evaluate.main", refuse)
        assert main(["eval", "runs/nano"]) == 2
        assert capsys.readouterr().err == line
