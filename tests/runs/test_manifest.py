"""Checks that digests detect and name every change to a checkpoint's files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsv3_jax.runs.manifest import find_damage, write_manifest

FILES = {"arrays/d/values": 5000, "arrays/manifest.ocdbt": 300, "run.json": 40, "empty": 0}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder of random files with its manifest."""
    folder = tmp_path_factory.mktemp("sealed") / "00000001"
    random = np.random.default_rng(0)
    for name, size in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(random.bytes(size))
    write_manifest(folder)
    return folder


@pytest.fixture
def sealed(whole: Path, tmp_path: Path) -> Path:
    """Returns a copy of the folder, to damage."""
    return shutil.copytree(whole, tmp_path / "00000001")


def test_an_untouched_folder_is_whole(sealed: Path):
    assert find_damage(sealed) is None


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([name for name, size in FILES.items() if size]), st.data())
def test_every_flipped_bit_is_found(sealed: Path, name: str, data: st.DataObject):
    path = sealed / name
    content = bytearray(path.read_bytes())
    offset = data.draw(st.integers(0, len(content) - 1))
    content[offset] ^= 1 << data.draw(st.integers(0, 7))
    try:
        original = path.read_bytes()
        path.write_bytes(content)
        damage = find_damage(sealed)
        assert damage is not None
        assert name in damage
    finally:
        path.write_bytes(original)


@pytest.mark.parametrize("name", list(FILES))
def test_a_missing_file_is_named(sealed: Path, name: str):
    (sealed / name).unlink()
    assert find_damage(sealed) == f"{name} is missing"


@pytest.mark.parametrize("name", [name for name, size in FILES.items() if size])
def test_a_truncated_or_zeroed_file_is_named(sealed: Path, name: str):
    content = (sealed / name).read_bytes()
    for damaged in (content[:-1], content[: len(content) // 2], b"", b"\0" * len(content), content + b"x"):
        (sealed / name).write_bytes(damaged)
        assert find_damage(sealed) == f"{name} is damaged"


def test_an_unexpected_file_is_named(sealed: Path):
    (sealed / "arrays" / "extra").write_text("?")
    damage = find_damage(sealed)
    assert damage is not None
    assert "arrays/extra" in damage


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"sha256": 3}', '{"sha256": {}}', "\0\0"])
def test_a_damaged_manifest_is_named(sealed: Path, content: str):
    (sealed / "manifest.json").write_text(content)
    assert find_damage(sealed) == "manifest.json is damaged"


def test_no_manifest_is_not_whole(sealed: Path):
    (sealed / "manifest.json").unlink()
    assert find_damage(sealed) == "manifest.json is missing"


def test_a_manifest_does_not_vouch_for_itself(sealed: Path):
    """A digest that was changed in the manifest is found, since it differs from the file's."""
    manifest = json.loads((sealed / "manifest.json").read_text())
    manifest["sha256"]["run.json"] = "0" * 64
    (sealed / "manifest.json").write_text(json.dumps(manifest))
    assert find_damage(sealed) == "run.json is damaged"
