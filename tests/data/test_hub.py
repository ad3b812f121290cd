"""Checks data sets that the library `datasets` loads: what is read, and that an interrupted reading goes on exactly."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from dsv3_jax.data import DataConfig, hub, prepare_data
from dsv3_jax.data.hub import streamed
from dsv3_jax.errors import UserError


@pytest.fixture
def data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a folder of two files that `datasets` loads, which it is kept from looking for in the network."""
    pytest.importorskip("datasets", reason="datasets comes with the extra `hf`")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "set"
    folder.mkdir()
    for file in range(2):
        rows = [{"text": f"document {file} {row} with é and 数\n" * 3, "other": row} for row in range(25)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"train-{file}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def texts(file: Path) -> list[str]:
    return [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]


def test_an_interrupted_reading_goes_on_at_the_next_document(
    data_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"hf:{data_set}"
    wanted = texts(streamed(name, 0, tmp_path / "whole", print))
    assert len(wanted) == 50
    assert wanted[0].startswith("document 0 0 with é")
    monkeypatch.setattr(hub, "_EVERY", 10)
    line, written = hub._line, []

    def failing(row: dict[str, Any], name: str) -> bytes:
        if len(written) == 33:
            raise ConnectionError("the network is gone")
        written.append(row)
        return line(row, name)

    monkeypatch.setattr(hub, "_line", failing)
    with pytest.raises(UserError, match="after 33 documents: the network is gone"):
        streamed(name, 0, tmp_path / "cut", print)
    monkeypatch.setattr(hub, "_line", line)
    said: list[str] = []
    assert texts(streamed(name, 0, tmp_path / "cut", said.append)) == wanted
    assert said == [f"going on with {name} after 30 documents"]
    (data_set / "train-0.jsonl").unlink()
    assert texts(streamed(name, 0, tmp_path / "cut", said.append)) == wanted, "a whole one is not read again"


def test_a_data_set_is_a_corpus(data_set: Path, tmp_path: Path) -> None:
    config = DataConfig(corpus=f"hf:{data_set}::train", tokenizer="byte", sequence_length=32, validation_fraction=0.2)
    data = prepare_data(config, tmp_path / "cache")
    assert sum(1 for split in ("train", "validation") for _ in data.documents(split)) == 50
    rows = data.train_iterator()
    rows.next_rows(3)
    again = prepare_data(config, tmp_path / "cache").train_iterator()
    again.set_state(rows.state())
    assert (again.next_rows(2)[0] == rows.next_rows(2)[0]).all()
    few = DataConfig(**{**vars(config), "hub_documents": 20})
    assert sum(1 for split in ("train", "validation") for _ in prepare_data(few, None).documents(split)) == 20


def test_what_cannot_be_loaded_is_one_line(data_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="cannot be loaded") as error:
        streamed(f"hf:{tmp_path / 'nowhere'}", 0, tmp_path / "cache", print)
    assert "\n" not in str(error.value)
    (data_set / "train-0.jsonl").write_text('{"content": "a"}\n')
    (data_set / "train-1.jsonl").write_text('{"content": "b"}\n')
    with pytest.raises(UserError, match="has no column 'text'; its columns are content"):
        streamed(f"hf:{data_set}", 0, tmp_path / "cache", print)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'dsv3-jax\[hf\]'"):
        streamed("hf:a/b", 0, tmp_path / "cache", print)
