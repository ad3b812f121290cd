"""What a folder may and may not make the reader open."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from interop.checkpoints import float32, write_checkpoint, write_index, write_tensors

from dsv3_jax.errors import UserError
from dsv3_jax.interop.checkpoint_folder import open_checkpoint

A, B = float32(np.zeros(3)), float32(np.ones((2, 2)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "sharded", {"a": A, "b": B}, "v2_lite", shards=2)


def refuse(folder: Path, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        open_checkpoint(folder)
    assert str(folder) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_sharded(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    assert checkpoint.names == {"a", "b"}
    assert checkpoint.entries is not None
    np.testing.assert_array_equal(checkpoint.entries["b"].read(), np.ones((2, 2)))


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "a/b.safetensors",
        "..\\x.safetensors",
        "x.bin",
        "x.safetensors\n",
        "",
        ".safetensors/..",
        "\0.safetensors",
        3,
        None,
        ["x.safetensors"],
    ],
)
def test_index_naming_other_places(folder: Path, name: object) -> None:
    write_tensors(folder.parent / "x.safetensors", {"a": A})
    write_index(folder, {"a": name})
    refuse(folder, "a plain name")


def test_link_out_of_the_folder(folder: Path) -> None:
    write_tensors(folder.parent / "x.safetensors", {"a": A})
    (folder / "link.safetensors").symlink_to(folder.parent / "x.safetensors")
    write_index(folder, {"a": "link.safetensors"})
    refuse(folder, "leads out")


def test_link_inside_the_folder(folder: Path) -> None:
    first = sorted(folder.glob("*.safetensors"))[0]
    (folder / "link.safetensors").symlink_to(first.name)
    write_index(folder, {"a": "link.safetensors"})
    assert open_checkpoint(folder).names == {"a"}


def test_links_of_a_download_cache_to_its_own_files(tmp_path: Path) -> None:
    """huggingface_hub keeps snapshots/REVISION/NAME as a link to blobs/DIGEST."""
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "1f"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    write_tensors(blobs / "d1", {"a": A})
    (snapshot / "model.safetensors").symlink_to("../../blobs/d1")
    assert open_checkpoint(snapshot).names == {"a"}
    (tmp_path / "linked").symlink_to(snapshot)
    assert open_checkpoint(tmp_path / "linked").names == {"a"}
    for outside in (tmp_path / "d1", tmp_path / "models--a--b" / "d1", blobs / "deeper" / "d1"):
        outside.parent.mkdir(exist_ok=True)
        write_tensors(outside, {"a": A})
        (snapshot / "model.safetensors").unlink()
        (snapshot / "model.safetensors").symlink_to(outside)
        refuse(snapshot, "leads out")


def test_two_sets_of_weights_in_one_folder(folder: Path) -> None:
    write_tensors(folder / "model-00001-of-00009.safetensors", {"a": A})
    assert "model-00001-of-00009.safetensors is of another set" in open_checkpoint(folder).notices[0]
    write_tensors(folder / "model.safetensors", {"a": A, "b": B})
    refuse(folder, "holds two sets of weights")
    write_index(folder, {"a": "model.safetensors", "b": "model.safetensors"})
    assert open_checkpoint(folder).names == {"a", "b"}


def test_pickles_beside_safetensors_are_not_looked_at(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.names, checkpoint.notices) == ({"a", "b"}, ())


def test_link_to_itself(folder: Path) -> None:
    (folder / "loop.safetensors").symlink_to("loop.safetensors")
    write_index(folder, {"a": "loop.safetensors"})
    refuse(folder, "is missing|leads out")


def test_a_pipe_is_not_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "pipe.safetensors")
    write_index(folder, {"a": "pipe.safetensors"})
    refuse(folder, "regular file")


def test_single_file_that_is_a_link_out(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.safetensors", {"a": A})
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "model.safetensors").symlink_to("../x.safetensors")
    refuse(tmp_path / "folder", "leads out")


def test_missing_shard(folder: Path) -> None:
    next(iter(folder.glob("model-00002*"))).unlink()
    refuse(folder, "model-00002-of-00002.safetensors: is missing")


def test_tensor_missing_from_its_shard(folder: Path) -> None:
    write_index(folder, {"a": "model-00001-of-00002.safetensors", "c": "model-00001-of-00002.safetensors"})
    refuse(folder, "lacks tensor 'c'")


def test_tensor_the_index_does_not_know(folder: Path) -> None:
    write_tensors(folder / "model-00001-of-00002.safetensors", {"a": A, "c": B})
    refuse(folder, "'c', but .* does not know it")


def test_tensor_twice(folder: Path) -> None:
    write_tensors(folder / "model-00002-of-00002.safetensors", {"a": A, "b": B})
    refuse(folder, "tensor 'a' is also in")


def test_tensor_in_another_shard_than_said(folder: Path) -> None:
    first, second = sorted(folder.glob("*.safetensors"))
    first.rename(folder / "swap")
    second.rename(first)
    (folder / "swap").rename(second)
    refuse(folder, "puts it in")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not valid JSON"),
        ("[]", "a JSON object"),
        ("{}", "no weight_map"),
        ('{"weight_map": []}', "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "twice"),
        ('{"a":' * 5000 + "1" + "}" * 5000, "deeper"),
    ],
)
def test_broken_index(folder: Path, text: str, words: str) -> None:
    (folder / "model.safetensors.index.json").write_text(text)
    refuse(folder, words)


def test_nothing_there(tmp_path: Path) -> None:
    refuse(tmp_path, "holds neither")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    refuse(tmp_path, "never opened")
    with pytest.raises(UserError, match="no such folder"):
        open_checkpoint(tmp_path / "absent")


def test_index_alone_gives_names(folder: Path) -> None:
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    checkpoint = open_checkpoint(folder, headers=False)
    assert checkpoint.names == {"a", "b"}
    assert checkpoint.entries is None
    refuse(folder, "is missing")


def test_thousands_of_names_make_a_short_message(folder: Path) -> None:
    weight_map = {f"t{i}": "model-00001-of-00002.safetensors" for i in range(5000)}
    write_index(folder, weight_map | {"a": "model-00001-of-00002.safetensors"})
    with pytest.raises(UserError, match="5,000 tensors") as caught:
        open_checkpoint(folder)
    assert len(str(caught.value)) < 600 + len(json.dumps(str(folder)))
