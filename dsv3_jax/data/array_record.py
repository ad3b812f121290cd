"""Pre-tokenised corpora: ArrayRecord files, one document a record.

A record is the document's name and domain in UTF-8, each ended by a zero byte, then its ids as little-endian uint32,
without end of text. `FILE.arrayrecord.json` beside the file names the tokenizer by its fingerprint.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import (  # pyright: ignore[reportMissingImports]
    ArrayRecordReader,
    ArrayRecordWriter,
)

from dsv3_jax.data.corpus import SIDECAR
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.errors import UserError

_RECORDS_A_READ = 256


def write_array_record(
    path: str | Path, documents: Iterable[tuple[str, str, Sequence[int]]], tokenizer: Tokenizer
) -> int:
    """Writes (name, domain, ids) documents, whole or not at all.

    Returns:
      How many were written.

    Raises:
      UserError: an id beyond the tokenizer's vocabulary, or the file cannot be written.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    count = 0
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        writer = ArrayRecordWriter(str(temporary), "group_size:1")
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
    """(name, domain, ids uint32) of every document in order.

    Raises:
      UserError: unreadable, not such a file, made with another tokenizer, or an id beyond the vocabulary.
    """
    file = Path(path)
    _check_sidecar(file, tokenizer)
    reader = _open(file)
    try:
        count = reader.num_records()
        for start in range(0, count, _RECORDS_A_READ):
            records = reader.read(range(start, min(start + _RECORDS_A_READ, count)))
            for index, record in enumerate(records, start=start):
                yield _parse(record, tokenizer, f"{file}, record {index}")
    except (RuntimeError, IndexError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} is damaged: {' '.join(str(error).split())[:200]}") from error
    finally:
        reader.close()


def count_array_records(path: str | Path) -> int:
    """Documents in a file."""
    reader = _open(Path(path))
    try:
        return reader.num_records()
    finally:
        reader.close()


def _open(file: Path) -> ArrayRecordReader:
    try:
        with file.open("rb"):
            pass
        reader = ArrayRecordReader(str(file))
        good = reader.ok()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    except RuntimeError as error:
        raise UserError(f"{file} is not an ArrayRecord file: {' '.join(str(error).split())[:200]}") from error
    if not good:
        raise UserError(f"{file} is not an ArrayRecord file, or it is cut short")
    return reader


def _parse(record: bytes, tokenizer: Tokenizer, where: str) -> tuple[str, str, np.ndarray]:
    parts = record.split(b"\0", 2)
    if len(parts) != 3 or len(parts[2]) % 4:
        raise UserError(f"{where}: expected name, domain and 4-byte ids: write it with write_array_record")
    try:
        name, domain = parts[0].decode("utf-8"), parts[1].decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{where}: its name or domain is not UTF-8: write it with write_array_record") from None
    ids = np.frombuffer(parts[2], "<u4")
    _check_ids(ids, tokenizer, where)
    return name, domain, ids


def _check_ids(ids: np.ndarray, tokenizer: Tokenizer, where: str) -> None:
    wrong = (ids < 0) | (ids >= tokenizer.vocab_size)
    if wrong.any():
        raise UserError(
            f"{where}: token id {int(ids[wrong][0])} lies beyond the tokenizer's vocabulary of {tokenizer.vocab_size}"
        )


def _check_sidecar(file: Path, tokenizer: Tokenizer) -> None:
    """Absent is allowed: files made elsewhere have none, and their ids are checked one by one."""
    sidecar = _sidecar(file)
    try:
        made_with = json.loads(sidecar.read_text(encoding="utf-8"))["tokenizer"]
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read {sidecar}: {error}") from error
    if made_with != tokenizer.fingerprint:
        raise UserError(f"{file} was tokenised with another tokenizer: set data.tokenizer to the one it was made with")


def _sidecar(file: Path) -> Path:
    return file.with_name(file.name + SIDECAR)
