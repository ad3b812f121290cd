"""Small checkpoints that tests write, without the project's own writer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax.interop.checkpoint_folder import open_checkpoint
from dsv3_jax.interop.fp8_weights import quantise, quantise_with

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


def fp8_checkpoint(folder: Path, name: str, *, power: bool = False, scale: float | None = None) -> Path:
    """A golden checkpoint with its linear maps in FP8, made without the project's exporter.

    With `scale`, a power of two, it is the scale of every block, and no block lacks the largest FP8 number: whoever
    quantizes the dequantized weights gets the same values and scales again.
    """
    tensors = {}
    for key, (dtype, shape, data) in golden_tensors(name).items():
        tensors[key] = (dtype, shape, data)
        linear = "_proj" in key and "eh_proj" not in key
        if linear:
            weights = np.frombuffer(data, np.float32).reshape(shape)
            values, scales = quantise(weights, power_of_two_scales=power)
            if scale is not None:
                scales = np.full_like(scales, scale)
                values = quantise_with(weights, scales)
                values[::64, 0] = 448
            tensors[key] = ("F8_E4M3", shape, values.tobytes())
            tensors[key + "_scale_inv"] = float32(scales)
    fp8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    return write_checkpoint(folder, tensors, golden_config(name, quantization_config=fp8), shards=3)
