"""How each tensor of a checkpoint is stored, and a record of how an imported one was."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import UserError
from dsv3_jax.interop.bounded_json import read_object
from dsv3_jax.interop.hf_config import Quantization
from dsv3_jax.interop.safetensors_reader import DTYPE_NAMES, DTYPES, read_header
from dsv3_jax.interop.safetensors_writer import TensorSpec, write_safetensors
from dsv3_jax.interop.tensor_names import SCALE_SUFFIX, Slot, slots

Format = Literal["float32", "bfloat16", "fp8"]
FP8 = "F8_E4M3"
_PLAIN = {"float32": "F32", "bfloat16": "BF16", "fp8": "BF16"}
_TORCH_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_RECORD, _SCALES = "layout.json", "scales.safetensors"
_MAX_RECORD_BYTES = 50_000_000


@dataclasses.dataclass(frozen=True)
class Layout:
    """How each tensor is stored.

    Attributes:
      dtypes: the file's dtype of every tensor (`F8_E4M3` for those with scales) by its published name.
      power_of_two_scales: FP8 scales are powers of two.
      scales: FP8 scales to store again, by the published name of the weight; others are made from the weights.
    """

    dtypes: Mapping[str, str]
    power_of_two_scales: bool = False
    scales: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def quantization(self) -> Quantization | None:
        """What config.json says of it."""
        return Quantization(self.power_of_two_scales) if FP8 in self.dtypes.values() else None

    @property
    def torch_dtype(self) -> str:
        """Name of the dtype of what is not quantised, for config.json."""
        return _TORCH_NAMES[self.dtypes["model.embed_tokens.weight"]]

    def specs(self, config: ModelConfig) -> Iterator[TensorSpec]:
        """Every tensor of a checkpoint in this layout, in order."""
        for slot in slots(config):
            yield TensorSpec(slot.name, self.dtypes[slot.name], slot.shape)
            if self.dtypes[slot.name] == FP8:
                yield TensorSpec(slot.name + SCALE_SUFFIX, "F32", slot.scale_shape)


def uniform_layout(config: ModelConfig, form: Format, *, power_of_two_scales: bool = False) -> Layout:
    """One format for a whole model; router biases are float32 in all, and in FP8 only linear maps are quantised."""

    def dtype(slot: Slot) -> str:
        if slot.always_float32:
            return "F32"
        return FP8 if form == "fp8" and slot.quantised else _PLAIN[form]

    return Layout({slot.name: dtype(slot) for slot in slots(config)}, power_of_two_scales)


def layout_of(config: ModelConfig, dtypes: Mapping[str, np.dtype], power_of_two_scales: bool) -> Layout:
    """Every parameter in the dtype it has, by our path."""
    return Layout({slot.name: DTYPE_NAMES[np.dtype(dtypes[slot.path])] for slot in slots(config)}, power_of_two_scales)


def save_record(layout: Layout, folder: Path) -> None:
    """Writes down how an imported checkpoint was stored, so that exporting it gives the same bytes."""
    folder.mkdir()
    record = {"dtypes": dict(layout.dtypes), "power_of_two_scales": layout.power_of_two_scales}
    (folder / _RECORD).write_text(json.dumps(record, indent=0))
    if layout.scales:
        specs = [TensorSpec(name, "F32", scale.shape) for name, scale in layout.scales.items()]
        write_safetensors(folder / _SCALES, specs, layout.scales.values())


def load_record(folder: Path, config: ModelConfig) -> Layout | None:
    """The inverse of `save_record`; None where there is no record."""
    if not (folder / _RECORD).exists():
        return None
    record = read_object(folder / _RECORD, max_bytes=_MAX_RECORD_BYTES)
    dtypes, powers = record.get("dtypes"), record.get("power_of_two_scales")
    if not isinstance(dtypes, dict) or not all(dtypes.get(slot.name) in DTYPES for slot in slots(config)):
        raise UserError(f"{folder / _RECORD}: is not the record of this model's layout; give --dtype")
    scales: dict[str, np.ndarray] = {}
    if (folder / _SCALES).exists():
        scales = {name: entry.read() for name, entry in read_header(folder / _SCALES).tensors.items()}
    return Layout(dtypes, bool(powers), scales)


def are_powers_of_two(scales: Iterable[np.ndarray]) -> bool:
    """Whether there are scales and every one is a power of two."""
    found = list(scales)
    return bool(found) and all((np.frexp(scale)[0] == 0.5).all() for scale in found)
