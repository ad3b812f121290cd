"""Small checkpoints that tests write, without the project's own writer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax.interop.checkpoint_folder import open_checkpoint

GOLDEN = Path(__file__).parents[1] / "golden"


def raw_tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """dtype, shape and bytes of every tensor of a checkpoint."""
    entries = open_checkpoint(folder).entries
    assert entries is not None
    return {name: (entry.dtype, entry.shape, entry.read().tobytes()) for name, entry in entries.items()}


def file_bytes(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file of any header, right or wrong; `length` lies about the header's length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def write_tensors(path: Path, tensors: dict[str, tuple[str, tuple[int, ...], bytes]]) -> None:
    """A safetensors file of raw tensors."""
    header, data = {}, b""
    for name, (dtype, shape, value) in tensors.items():
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [len(data), len(data) + len(value)],
        }
        data += value
    path.write_bytes(file_bytes(header, data))


def golden_tensors(name: str) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """The raw tensors of a golden checkpoint."""
    return raw_tensors(GOLDEN / name)


def write_checkpoint(
    folder: Path,
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]],
    config: dict[str, Any] | str,
    *,
    shards: int = 1,
) -> Path:
    """A checkpoint folder; `config` is a dictionary or the name of a golden checkpoint whose config.json it gets."""
    folder.mkdir(parents=True, exist_ok=True)
    values = config if isinstance(config, dict) else golden_config(config)
    (folder / "config.json").write_text(json.dumps(values))
    if shards == 1:
        write_tensors(folder / "model.safetensors", tensors)
        return folder
    weight_map = {}
    for number in range(shards):
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: tensors[key] for key in list(tensors)[number::shards]}
        write_tensors(folder / name, part)
        weight_map |= dict.fromkeys(part, name)
    write_index(folder, weight_map)
    return folder


def write_index(folder: Path, weight_map: dict[str, Any]) -> None:
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map})
    )


def golden_config(name: str, **changes: Any) -> dict[str, Any]:
    """The config.json of a golden checkpoint, some fields changed."""
    return json.loads((GOLDEN / name / "config.json").read_text()) | changes


def float32(values: np.ndarray) -> tuple[str, tuple[int, ...], bytes]:
    """An array as a raw tensor."""
    return "F32", values.shape, values.astype(np.float32).tobytes()
