"""Corpora that are already tokenised: ArrayRecord files with one document per record.

A record holds the document's name and domain in UTF-8, each followed by a zero byte, and then its ids as little-endian
uint32, without the end-of-text token. The file `FILE.arrayrecord.json` next to it has the tokenizer's fingerprint.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax.bounded_json import read_object
from dsv3_jax.data.file_kinds import SIDECAR
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.errors import UserError
from dsv3_jax.regular_files import check_regular

_RECORDS_PER_READ = 256
_MAX_SIDECAR_BYTES = 1_000_000


def write_array_record(
    path: str | Path, documents: Iterable[tuple[str, str, Sequence[int]]], tokenizer: Tokenizer
) -> int:
    """Writes documents to a file. If anything fails, no file is left.

    Args:
      path: the file, with the suffix .arrayrecord.
      documents: name, domain and ids of each document.
      tokenizer: what the documents were tokenised with.

    Returns:
      The number of documents written.

    Raises:
      UserError: an id is outside the tokenizer's vocabulary, or the file cannot be written.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    count = 0
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        writer = _array_record().ArrayRecordWriter(str(temporary), "group_size:1")
        try:
            for name, domain, ids in documents:
                array = np.asarray(ids, np.int64)
                _check_ids(array, tokenizer, f"document {name}")
                header = f"{name.replace(chr(0), ' ')}\0{domain.replace(chr(0), ' ')}\0".encode()
                writer.write(header + array.astype("<u4").tobytes())
                count += 1
        finally:
            writer.close()
        sidecar = {"tokenizer": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size, "documents": count}
        _sidecar(target).write_text(json.dumps(sidecar) + "\n", encoding="utf-8")
        temporary.replace(target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}") from error
    except RuntimeError as error:
        raise UserError(f"cannot write {target}: {' '.join(str(error).split())}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    return count


def read_array_record(path: str | Path, tokenizer: Tokenizer) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yields name, domain and ids (uint32) of every document, in order.

    Raises:
      UserError: the file cannot be read, is not of this format, was made with another tokenizer, or holds an id outside
        the vocabulary.
    """
    file = Path(path)
    _check_sidecar(file, tokenizer)
    reader = _open(file)
    try:
        count = reader.num_records()
        for start in range(0, count, _RECORDS_PER_READ):
            records = reader.read(range(start, min(start + _RECORDS_PER_READ, count)))
            for index, record in enumerate(records, start=start):
                yield _parse(record, tokenizer, f"{file}, record {index}")
    except (RuntimeError, IndexError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} is damaged: {' '.join(str(error).split())[:200]}") from error
    finally:
        reader.close()


def _array_record() -> Any:
    """Returns the module that reads and writes ArrayRecord files. Training and import of weights do without it."""
    from array_record.python import array_record_module  # pyright: ignore

    return array_record_module


def _open(file: Path) -> Any:
    check_regular(file)
    try:
        reader = _array_record().ArrayRecordReader(str(file))
        good = reader.ok()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    except RuntimeError as error:
        raise UserError(f"{file} is not an ArrayRecord file: {' '.join(str(error).split())[:200]}") from error
    if not good:
        raise UserError(f"{file} is not an ArrayRecord file, or it is incomplete")
    return reader


def _parse(record: bytes, tokenizer: Tokenizer, where: str) -> tuple[str, str, np.ndarray]:
    parts = record.split(b"\0", 2)
    if len(parts) != 3 or len(parts[2]) % 4:
        raise UserError(f"{where}: expected name, domain and 4-byte ids; write the file with write_array_record")
    try:
        name, domain = parts[0].decode("utf-8"), parts[1].decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{where}: its name or domain is not UTF-8; write the file with write_array_record") from None
    ids = np.frombuffer(parts[2], "<u4")
    _check_ids(ids, tokenizer, where)
    return name, domain, ids


def _check_ids(ids: np.ndarray, tokenizer: Tokenizer, where: str) -> None:
    wrong = (ids < 0) | (ids >= tokenizer.vocab_size)
    if wrong.any():
        raise UserError(
            f"{where}: token id {int(ids[wrong][0])} is outside the tokenizer's vocabulary of {tokenizer.vocab_size}"
        )


def _check_sidecar(file: Path, tokenizer: Tokenizer) -> None:
    """Checks the tokenizer's fingerprint. Files made by other programs have none; their ids are checked one by one."""
    sidecar = _sidecar(file)
    if not sidecar.exists():
        return
    made_with = read_object(sidecar, max_bytes=_MAX_SIDECAR_BYTES).get("tokenizer")
    if made_with != tokenizer.fingerprint:
        raise UserError(f"{file} was tokenised with another tokenizer; set data.tokenizer to that one")


def _sidecar(file: Path) -> Path:
    return file.with_name(file.name + SIDECAR)
