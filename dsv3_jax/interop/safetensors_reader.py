"""Reads safetensors files: the header at once, tensors when they are asked for. Nothing in the file is trusted.

The format: the length N of the header (8 bytes, little-endian), N bytes of JSON that map tensor names to dtype, shape
and byte offsets into the data, then the data. ml_dtypes provides float8 and bfloat16, which numpy lacks. No memory is
allocated for a size that the file does not really have.
"""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dsv3_jax.bounded_json import parse_object, shown
from dsv3_jax.errors import UserError
from dsv3_jax.regular_files import open_regular

MAX_HEADER_BYTES = 100_000_000
MAX_RANK = 8

DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
DTYPE_NAMES: dict[np.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a file has one tensor; `start` counts bytes from the beginning of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    path: Path

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.size * DTYPES[self.dtype].itemsize

    def read(self) -> np.ndarray:
        """Returns the whole tensor."""
        return self.read_rows(0, self.shape[0]) if self.shape else self._read(0, 1).reshape(())

    def read_rows(self, first: int, last: int) -> np.ndarray:
        """Returns rows first .. last - 1 along the first axis, [last - first, ...]; only these are read."""
        row = math.prod(self.shape[1:])
        return self._read(first * row, last * row).reshape(last - first, *self.shape[1:])

    def read_rows_into(self, first: int, last: int, target: np.ndarray) -> None:
        """Reads rows first .. last - 1 into `target`, a C-contiguous array of this dtype with as many elements."""
        row = math.prod(self.shape[1:])
        self._fill(target.reshape(-1).view(np.uint8), first * row * target.itemsize)
        assert target.size == (last - first) * row

    def _read(self, first: int, last: int) -> np.ndarray:
        dtype = DTYPES[self.dtype]
        flat = np.empty(last - first, dtype)
        self._fill(flat.view(np.uint8), first * dtype.itemsize)
        return flat

    def _fill(self, target: np.ndarray, offset: int) -> None:
        """Fills the bytes `target` from the tensor's bytes, beginning at `offset`."""
        if not target.size:
            return
        with open_regular(self.path) as file:
            view, position = memoryview(target), self.start + offset
            try:
                while len(view):
                    count = os.preadv(file.fileno(), [view[: 1 << 30]], position)
                    if count == 0:
                        raise UserError(f"{self.path}: tensor {shown(self.name)} ends early; the file was cut")
                    view, position = view[count:], position + count
            except OSError as error:
                raise UserError(f"{self.path}: tensor {shown(self.name)} cannot be read ({error.strerror})") from None


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Returns the tensors of a safetensors file by name, after checking that their offsets cover the data exactly.

    Raises:
      UserError: anything is wrong with the header; the message names file and tensor.
    """
    with open_regular(path) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            length_bytes = file.read(8)
            if len(length_bytes) < 8:
                raise UserError(f"{path}: {size} bytes are too few for a safetensors file")
            length = int.from_bytes(length_bytes, "little")
            if length > MAX_HEADER_BYTES:
                raise UserError(f"{path}: header of {length:,} bytes; at most {MAX_HEADER_BYTES:,} are allowed")
            if length > size - 8:
                raise UserError(f"{path}: header of {length:,} bytes in a file of {size:,}; the file was cut")
            raw = file.read(length)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
    if len(raw) < length:
        raise UserError(f"{path}: the header ends early; the file was cut")
    if not raw.startswith(b"{"):
        raise UserError(f"{path}: the header does not start with '{{'; not a safetensors file")
    header = parse_object(raw, f"{path}: header")
    _check_metadata(header.pop("__metadata__", {}), path)
    data_start = 8 + length
    entries = [_checked_entry(name, fields, data_start, size, path) for name, fields in header.items()]
    _check_coverage(entries, data_start, size, path)
    return {entry.name: entry for entry in entries}


def _check_metadata(metadata: Any, path: Path) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UserError(f"{path}: __metadata__ must map strings to strings")


def _checked_entry(name: str, fields: Any, data_start: int, file_size: int, path: Path) -> TensorEntry:
    where = f"{path}: tensor {shown(name)}"
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise UserError(f"{where} must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UserError(f"{where} has dtype {shown(dtype)}; known are {', '.join(DTYPES)}")
    if not _are_counts(shape) or len(shape) > MAX_RANK:
        raise UserError(f"{where} has shape {shown(shape)}; expected at most {MAX_RANK} whole numbers")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise UserError(f"{where} has data_offsets {shown(offsets)}; expected two whole numbers")
    begin, end = offsets
    if begin > end or data_start + end > file_size:
        raise UserError(
            f"{where} is at bytes {begin}..{end} of {file_size - data_start:,}; the file was cut or damaged"
        )
    wanted = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != wanted:
        raise UserError(f"{where} has {end - begin:,} bytes; {dtype} {shape} needs {wanted:,}")
    return TensorEntry(name, dtype, tuple(shape), data_start + begin, path)


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _check_coverage(entries: list[TensorEntry], data_start: int, file_size: int, path: Path) -> None:
    """Checks that the tensors follow one another without a gap or overlap, to the last byte."""
    position = data_start
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.nbytes)):
        if entry.start != position:
            fault = "overlaps the one before it" if entry.start < position else "leaves a gap before it"
            raise UserError(f"{path}: tensor {shown(entry.name)} {fault}")
        position += entry.nbytes
    if position != file_size:
        raise UserError(f"{path}: {file_size - position:,} bytes after the last tensor belong to no tensor")
