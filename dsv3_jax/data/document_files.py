"""The documents in one file, read by its suffix: .jsonl, .parquet, or text."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsv3_jax.errors import UserError

_ROWS_PER_READ = 256


@dataclasses.dataclass(frozen=True)
class Document:
    """A text of the corpus.

    Attributes:
      name: unique within the corpus, and the same when the corpus is moved.
      domain: the kind of text: the file's `domain` column, else its folder, else its suffix.
      text: the text itself.
    """

    name: str
    domain: str
    text: str


def read_documents(file: Path, name: str, domain: str) -> Iterator[Document]:
    """Yields the documents of a file. Those of .jsonl and .parquet files are named `name:row`.

    Raises:
      UserError: the file cannot be read, is not UTF-8 (the message gives the offset in bytes), or is malformed (the
        message gives the line or row).
    """
    with reading(file):
        match file.suffix.lower():
            case ".jsonl":
                yield from _read_jsonl(file, name, domain)
            case ".parquet":
                yield from _read_parquet(file, name, domain)
            case _:
                yield Document(name, domain, decode_utf8(file.read_bytes(), file))


def count_documents(file: Path) -> int:
    """Returns the number of documents that `read_documents` yields, without decoding them."""
    with reading(file):
        match file.suffix.lower():
            case ".jsonl":
                with file.open("rb") as lines:
                    return sum(1 for line in lines if line.strip())
            case ".parquet":
                return _open_parquet(file).metadata.num_rows
            case _:
                return 1


def sha256_of_file(file: Path) -> str:
    """Returns the SHA-256 of the content, in hexadecimal."""
    with reading(file), file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turns an OSError in the block into a UserError that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or _one_line(error)}") from error


def decode_utf8(raw: bytes, file: Path, start: int = 0) -> str:
    """Decodes bytes that begin at offset `start` of `file`.

    Raises:
      UserError: they are not UTF-8; the message names the file and the offset.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file} is not UTF-8 at byte {start + error.start} (0x{raw[error.start]:02x}); "
            "convert the file or remove it from the corpus"
        ) from None


def _read_jsonl(file: Path, name: str, domain: str) -> Iterator[Document]:
    offset = 0
    with file.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            line = decode_utf8(raw, file, offset)
            offset += len(raw)
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{file}, line {number}: not JSON: {error}") from None
            if not isinstance(row, dict):
                raise UserError(f"{file}, line {number}: expected an object with a field 'text'")
            yield _document(row, f"{name}:{number}", domain, f"{file}, line {number}")


def _read_parquet(file: Path, name: str, domain: str) -> Iterator[Document]:
    from pyarrow import ArrowException

    table = _open_parquet(file)
    columns = [column for column in ("text", "domain") if column in table.schema_arrow.names]
    row = 0
    try:
        for batch in table.iter_batches(batch_size=_ROWS_PER_READ, columns=columns):
            for values in batch.to_pylist():
                row += 1
                yield _document(values, f"{name}:{row}", domain, f"{file}, row {row}")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 at byte {error.start} of a text after row {row}") from None
    except ArrowException as error:
        raise UserError(f"{file} is damaged after row {row}: {_one_line(error)}") from error


def _open_parquet(file: Path) -> Any:
    import pyarrow.parquet as parquet
    from pyarrow import ArrowException

    try:
        opened = parquet.ParquetFile(file)
    except ArrowException as error:
        raise UserError(f"{file} is not a Parquet file: {_one_line(error)}") from error
    if "text" not in opened.schema_arrow.names:
        raise UserError(f"{file} has no column 'text'; its columns are {', '.join(opened.schema_arrow.names)}")
    return opened


def _document(row: dict[str, Any], name: str, domain: str, where: str) -> Document:
    text = row.get("text")
    if not isinstance(text, str):
        raise UserError(f"{where}: expected a field 'text' that holds a string, not {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: character {error.start} is a lone surrogate, which has no UTF-8 form") from None
    own = row.get("domain")
    return Document(name, own if isinstance(own, str) and own else domain, text)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
