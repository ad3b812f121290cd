"""How each tensor of a checkpoint is stored, and the record of it that an imported run keeps."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from dsv3_jax.bounded_json import read_object
from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import UserError
from dsv3_jax.interop.hf_config import Quantization
from dsv3_jax.interop.safetensors_reader import DTYPE_NAMES, DTYPES, read_header
from dsv3_jax.interop.safetensors_writer import TensorSpec, write_safetensors
from dsv3_jax.interop.tensor_names import SCALE_SUFFIX, PublishedTensor, published_tensors

DtypeName = Literal["float32", "bfloat16", "fp8"]
FP8 = "F8_E4M3"
_PLAIN = {"float32": "F32", "bfloat16": "BF16", "fp8": "BF16"}
_TORCH_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_RECORD, _SCALES = "layout.json", "scales.safetensors"
_MAX_RECORD_BYTES = 50_000_000


@dataclasses.dataclass(frozen=True)
class StoredFormat:
    """The dtype in which each tensor of a checkpoint is stored, and its FP8 scales.

    Attributes:
      dtypes: safetensors' name of every tensor's dtype (`F8_E4M3` for those with scales), by published name.
      power_of_two_scales: whether FP8 scales are powers of two.
      scales: FP8 scales that are stored as they are, by the published name of the weight. The scales of other weights
        are computed from the weights.
    """

    dtypes: Mapping[str, str]
    power_of_two_scales: bool = False
    scales: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def quantization(self) -> Quantization | None:
        """The FP8 format that config.json describes; None where no tensor is FP8."""
        return Quantization(self.power_of_two_scales) if FP8 in self.dtypes.values() else None

    @property
    def torch_dtype(self) -> str:
        """Name of the dtype of tensors that are not quantised, for config.json."""
        return _TORCH_NAMES[self.dtypes["model.embed_tokens.weight"]]

    def specs(self, config: ModelConfig) -> Iterator[TensorSpec]:
        """Yields every tensor of a checkpoint in this format, in the order of the file."""
        for tensor in published_tensors(config):
            yield TensorSpec(tensor.name, self.dtypes[tensor.name], tensor.shape)
            if self.dtypes[tensor.name] == FP8:
                yield TensorSpec(tensor.name + SCALE_SUFFIX, "F32", tensor.scale_shape)


def uniform_format(config: ModelConfig, name: DtypeName, *, power_of_two_scales: bool = False) -> StoredFormat:
    """Returns the format with one dtype for the whole model.

    Router biases are float32 always. With "fp8", only linear maps are quantised and the others are bfloat16.
    """

    def dtype(tensor: PublishedTensor) -> str:
        if tensor.always_float32:
            return "F32"
        return FP8 if name == "fp8" and tensor.quantised else _PLAIN[name]

    return StoredFormat({tensor.name: dtype(tensor) for tensor in published_tensors(config)}, power_of_two_scales)


def format_of_parameters(
    config: ModelConfig, dtypes: Mapping[str, np.dtype], power_of_two_scales: bool
) -> StoredFormat:
    """Returns the format that keeps the dtype of every parameter.

    Args:
      dtypes: the dtype of each parameter by its path.
    """
    names = {tensor.name: DTYPE_NAMES[np.dtype(dtypes[tensor.path])] for tensor in published_tensors(config)}
    return StoredFormat(names, power_of_two_scales)


def save_format(stored_format: StoredFormat, folder: Path) -> None:
    """Writes to `folder` how an imported checkpoint was stored, so that exporting it gives the same bytes."""
    folder.mkdir()
    record = {"dtypes": dict(stored_format.dtypes), "power_of_two_scales": stored_format.power_of_two_scales}
    (folder / _RECORD).write_text(json.dumps(record, indent=0), encoding="utf-8")
    if stored_format.scales:
        specs = [TensorSpec(name, "F32", scale.shape) for name, scale in stored_format.scales.items()]
        write_safetensors(folder / _SCALES, specs, stored_format.scales.values())


def load_format(folder: Path, config: ModelConfig) -> StoredFormat | None:
    """Returns what `save_format` wrote to `folder`; None where it wrote nothing.

    Raises:
      UserError: the record is of another model, or damaged.
    """
    if not (folder / _RECORD).exists():
        return None
    record = read_object(folder / _RECORD, max_bytes=_MAX_RECORD_BYTES)
    dtypes, powers = record.get("dtypes"), record.get("power_of_two_scales")
    if not isinstance(dtypes, dict) or not all(
        dtypes.get(tensor.name) in DTYPES for tensor in published_tensors(config)
    ):
        raise UserError(f"{folder / _RECORD}: is not the record of how this model was stored; give --dtype")
    scales: dict[str, np.ndarray] = {}
    if (folder / _SCALES).exists():
        scales = {name: entry.read() for name, entry in read_header(folder / _SCALES).items()}
    return StoredFormat(dtypes, bool(powers), scales)


def are_powers_of_two(scales: Iterable[np.ndarray]) -> bool:
    """Tells whether there are scales and every one is a power of two."""
    found = list(scales)
    return bool(found) and all((np.frexp(scale)[0] == 0.5).all() for scale in found)
