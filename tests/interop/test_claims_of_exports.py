"""Checks what an export says about itself: the form of its scales, sizes of files, and pieces of a bounded size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from interop.checkpoints import GOLDEN

import dsv3_jax as dsv3
from dsv3_jax.config import ModelConfig
from dsv3_jax.interop.exporter import split_into_shards
from dsv3_jax.interop.file_pieces import pieces
from dsv3_jax.interop.safetensors_reader import TensorEntry
from dsv3_jax.interop.safetensors_writer import TensorSpec
from dsv3_jax.interop.stored_format import are_powers_of_two
from dsv3_jax.interop.stored_tensor import StoredTensor
from dsv3_jax.interop.tensor_names import published_tensors


def test_all_scales_must_be_powers_of_two() -> None:
    powers, other = np.float32([[1, 2.0**-126], [0.5, 1024]]), np.float32([[1, 3], [0.5, 2]])
    assert are_powers_of_two([powers, powers])
    assert not are_powers_of_two([powers, other])
    assert not are_powers_of_two([other, powers])
    assert not are_powers_of_two([])


def test_an_export_of_mixed_scales_does_not_claim_powers_of_two(tmp_path: Path) -> None:
    """One tensor's scales become powers of two: the export of the kept FP8 weights still has ordinary scales."""
    dsv3.save_hf(dsv3.load_hf(GOLDEN / "v3_negative_bias"), tmp_path / "fp8", dtype="fp8")
    (path,) = (tmp_path / "fp8").glob("*.safetensors")
    raw = bytearray(path.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    name = next(name for name in header if name.endswith("kv_b_proj.weight_scale_inv"))
    start, stop = (8 + length + offset for offset in header[name]["data_offsets"])
    raw[start:stop] = np.full((stop - start) // 4, 2.0**-10, np.float32).tobytes()
    path.write_bytes(raw)
    dsv3.save_hf(dsv3.load_hf(tmp_path / "fp8", keep_fp8=True), tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert written.get("scale_fmt") is None
    assert written["quant_method"] == "fp8"


def test_total_size_of_an_fp8_checkpoint_counts_scales(tmp_path: Path) -> None:
    model = dsv3.load_hf(GOLDEN / "v3_negative_bias")
    dsv3.save_hf(model, tmp_path / "out", dtype="fp8", max_shard_bytes=50_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    data = 0
    for path in (tmp_path / "out").glob("*.safetensors"):
        data += path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little")
    assert index["metadata"]["total_size"] == data
    assert sum(name.endswith("_scale_inv") for name in index["weight_map"]) > 10


def test_a_shard_is_filled_to_its_last_byte() -> None:
    specs = [TensorSpec(name, "F32", (size,)) for name, size in (("a", 10), ("b", 15), ("c", 1), ("d", 25))]
    shards = [[spec.name for spec in shard] for shard in split_into_shards(specs, 100).values()]
    assert shards == [["a", "b"], ["c"], ["d"]]


@pytest.mark.parametrize("max_bytes", [1, 256, 1000, 4096, 10**9])
def test_pieces_are_no_larger_than_asked(max_bytes: int) -> None:
    """A piece has at least one row; beyond that it stays within the bytes that the caller allows, and none is lost."""
    config = ModelConfig.preset("tiny")
    tensor = next(tensor for tensor in published_tensors(config) if tensor.name == "model.embed_tokens.weight")
    rows, width = tensor.shape
    stored = StoredTensor(tensor, TensorEntry(tensor.name, "F32", tensor.shape, 0, Path("none")))  # pyright: ignore
    half = rows // 2
    boxes = [((0, half), (0, width)), ((half, rows), (0, width))]
    found = list(pieces([stored], boxes, max_bytes))
    assert [row for piece in found for row in range(piece.first, piece.last)] == list(range(rows))
    assert max(piece.nbytes for piece in found) <= max(max_bytes, 4 * width)
    assert all(piece.nbytes == 4 * piece.size for piece in found)
