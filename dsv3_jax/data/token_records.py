"""Documents that are already token ids, in an ArrayRecord file: one int32 array a record, without end token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from array_record.python import array_record_module

from dsv3_jax.errors import UserError


def write_token_records(path: Path, documents: Iterable[np.ndarray]) -> None:
    """Writes one record a document."""
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    try:
        for tokens in documents:
            writer.write(np.ascontiguousarray(tokens, "<i4").tobytes())
    finally:
        writer.close()


def read_token_records(path: Path) -> Iterator[np.ndarray]:
    """The documents of a file written by `write_token_records`.

    Raises:
      UserError: the file is no ArrayRecord, or a record is no list of int32.
    """
    try:
        reader = array_record_module.ArrayRecordReader(str(path))
        records = reader.read_all()
        reader.close()
    except Exception as error:
        raise UserError(f"{path} cannot be read as ArrayRecord: {str(error).splitlines()[0]}") from error
    for number, record in enumerate(records):
        if len(record) % 4:
            raise UserError(f"{path} record {number} is no list of int32: it has {len(record)} bytes")
        tokens = np.frombuffer(record, "<i4")
        if tokens.size and tokens.min() < 0:
            raise UserError(f"{path} record {number} holds a negative token id")
        yield tokens
