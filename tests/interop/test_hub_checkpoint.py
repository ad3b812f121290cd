"""Checks checkpoints that are named as on the Hugging Face hub: what is fetched, and what is said otherwise."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from golden_data import FOLDER

from dsv3_jax.cli.main import main
from dsv3_jax.errors import UserError
from dsv3_jax.interop.hub_checkpoint import checkpoint_path


def test_a_name_is_fetched_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, Any, list[str]]] = []

    def snapshot_download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision, allow_patterns))
        return str(FOLDER / "v3_negative_bias")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download))
    assert main(["import-hf", "owner/name@v1", "--dry-run"]) == 0
    assert "in all, each used once" in capsys.readouterr().out
    assert checkpoint_path("owner/name") == FOLDER / "v3_negative_bias"
    assert [each[:2] for each in asked] == [("owner/name", "v1"), ("owner/name", None)]
    assert ["*.safetensors" in each[2] for each in asked] == [False, True]


def test_a_folder_is_taken_first_and_other_texts_are_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    (tmp_path / "a" / "b").mkdir(parents=True)
    for source in ("a/b", "nowhere", "/x/y", "a/b/c"):
        assert checkpoint_path(source) == Path(source)


def test_what_cannot_be_fetched_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no network\nhere")

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=refuse))
    with pytest.raises(UserError, match="the hub does not give it: no network here"):
        checkpoint_path("owner/name")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"no such folder; .* pip install 'dsv3-jax\[hf\]'"):
        checkpoint_path("owner/name")
