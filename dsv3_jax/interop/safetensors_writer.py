"""Writes safetensors files one tensor at a time, so that at most one tensor is in memory."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from dsv3_jax.interop.safetensors_reader import DTYPES


@dataclasses.dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, dtype and shape of a tensor, as they are in the header of a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def write_safetensors(
    path: Path,
    specs: Sequence[TensorSpec],
    values: Iterable[np.ndarray],
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Writes a file, and returns when it is on the disk.

    Args:
      path: a new file.
      specs: its tensors.
      values: their values in the same order, taken one at a time.
      advance: is called with the number of bytes that were written.

    Raises:
      OSError: the disk is full or cannot be written.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for spec in specs:
        end = position + spec.nbytes
        header[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for spec, value in zip(specs, values, strict=True):
            assert (value.shape, value.dtype) == (spec.shape, DTYPES[spec.dtype]), (spec, value.shape)
            file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
            advance(spec.nbytes)
        file.flush()
        os.fsync(file.fileno())
