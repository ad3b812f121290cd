"""The documents or rows in one file: JSON lines, Parquet or text, perhaps compressed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import lzma
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsv3_jax.data.file_kinds import BYTE_ORDER_MARK, FileKind, open_decompressed
from dsv3_jax.errors import UserError
from dsv3_jax.regular_files import check_regular, open_regular

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


@dataclasses.dataclass(frozen=True)
class NullText:
    """A row whose text is null, which is not a document.

    Attributes:
      where: the file and the line or row, for messages.
    """

    where: str


@dataclasses.dataclass(frozen=True)
class FileRow:
    """A row of a file of JSON lines or a Parquet file.

    Attributes:
      number: number of the line or row, from 1.
      where: the file and the line or row, for messages.
      values: its fields.
    """

    number: int
    where: str
    values: dict[str, Any]


_OF_DOCUMENTS = ("text", "domain")


def read_rows(file: Path, kind: FileKind, needed: Sequence[str], others: Sequence[str] = ()) -> Iterator[FileRow]:
    """Yields the rows of a file of JSON lines, or of a Parquet file.

    Args:
      needed: fields of which each file must have at least one column if it is Parquet.
      others: further columns that are read from a Parquet file; JSON lines are read whole.

    Raises:
      UserError: the file cannot be read, is not UTF-8, or is malformed; the message gives the line or row.
    """
    with reading(file):
        if kind.form == "lines":
            yield from _json_rows(file, kind, needed)
        else:
            yield from _parquet_rows(file, needed, others)


def read_documents(file: Path, kind: FileKind, name: str, domain: str) -> Iterator[Document | NullText]:
    """Yields the documents of a file. Those of JSON lines and Parquet files are named `name:row`.

    Raises:
      UserError: the file cannot be read, is not UTF-8 (the message gives the offset in bytes), or is malformed (the
        message gives the line or row).
    """
    with reading(file):
        match kind.form:
            case "lines" | "parquet":
                for row in read_rows(file, kind, _OF_DOCUMENTS[:1], _OF_DOCUMENTS[1:]):
                    yield _document(row.values, f"{name}:{row.number}", domain, row.where)
            case _:
                with open_decompressed(file, kind.compression) as stream:
                    yield Document(name, domain, decode_utf8(_without_mark(stream.read()), file))


def count_documents(file: Path, kind: FileKind) -> int:
    """Returns the number of rows that `read_documents` yields, those whose text is null included."""
    with reading(file):
        match kind.form:
            case "lines":
                with open_decompressed(file, kind.compression) as lines:
                    return sum(1 for line in lines if line.strip())
            case "parquet":
                return _open_parquet(file, _OF_DOCUMENTS[:1]).metadata.num_rows
            case _:
                return 1


def sha256_of_file(file: Path) -> str:
    """Returns the SHA-256 of the content, in hexadecimal."""
    with reading(file), open_regular(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turns an error of reading or decompressing in the block into a UserError that names the file."""
    try:
        yield
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise UserError(f"cannot read {file}: {getattr(error, 'strerror', None) or _one_line(error)}") from error


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


def _without_mark(raw: bytes) -> bytes:
    """Returns the bytes without the byte order mark that some programs put before UTF-8."""
    return raw.removeprefix(BYTE_ORDER_MARK)


def _json_rows(file: Path, kind: FileKind, needed: Sequence[str]) -> Iterator[FileRow]:
    offset = 0
    with open_decompressed(file, kind.compression) as lines:
        for number, raw in enumerate(lines, start=1):
            line = decode_utf8(raw if number > 1 else _without_mark(raw), file, offset)
            offset += len(raw)
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{file}, line {number}: not JSON: {_one_line(error)}") from None
            if not isinstance(row, dict):
                raise UserError(f"{file}, line {number}: expected an object with a field {_either(needed)}")
            yield FileRow(number, f"{file}, line {number}", row)


def _parquet_rows(file: Path, needed: Sequence[str], others: Sequence[str]) -> Iterator[FileRow]:
    from pyarrow import ArrowException

    table = _open_parquet(file, needed)
    columns = [column for column in (*needed, *others) if column in table.schema_arrow.names]
    row = 0
    try:
        for batch in table.iter_batches(batch_size=_ROWS_PER_READ, columns=columns):
            for values in batch.to_pylist():
                row += 1
                yield FileRow(row, f"{file}, row {row}", values)
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 at byte {error.start} of a text after row {row}") from None
    except ArrowException as error:
        raise UserError(f"{file} is damaged after row {row}: {_one_line(error)}") from error


def _open_parquet(file: Path, needed: Sequence[str]) -> Any:
    import pyarrow.parquet as parquet
    from pyarrow import ArrowException

    check_regular(file)
    try:
        opened = parquet.ParquetFile(file)
    except ArrowException as error:
        raise UserError(f"{file} is not a Parquet file: {_one_line(error)}") from error
    if not set(needed) & set(opened.schema_arrow.names):
        columns = ", ".join(opened.schema.column(index).path for index in range(len(opened.schema)))
        raise UserError(f"{file} has no column {_either(needed)}; its columns are {columns}")
    return opened


def _either(names: Sequence[str]) -> str:
    *rest, last = map(repr, names)
    return f"{', '.join(rest)} or {last}" if rest else last


def _document(row: dict[str, Any], name: str, domain: str, where: str) -> Document | NullText:
    if "text" not in row:
        fields = ", ".join(map(repr, list(row)[:8]))
        raise UserError(f"{where}: expected a field 'text' that holds a string; the fields are {fields or 'none'}")
    text = row["text"]
    if text is None:
        return NullText(where)
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
