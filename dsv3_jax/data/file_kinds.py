"""Tells from a file's name, and for .json from its first line, how its documents are stored and compressed."""

from __future__ import annotations

import bz2
import dataclasses
import gzip
import io
import json
import lzma
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Literal, cast

from dsv3_jax.regular_files import open_regular

PRETOKENISED, SIDECAR = ".arrayrecord", ".json"
TOKEN_BIN = ".bin"
Form = Literal["lines", "parquet", "text", "tokens"]

_LINES = {".jsonl", ".ndjson"}
_COMPRESSIONS = {".gz", ".bz2", ".xz", ".zst"}
_COMPRESSED_TEXT = {".txt", ".text", ".md", ".json", *_LINES}
_ARCHIVES = {".7z", ".tar", ".tgz", ".tbz2", ".txz", ".zip", ".whl", ".jar"}
# Files that folders of code often hold and that are not text. Every other file must be UTF-8.
_NOT_TEXT = {
    *(".a", ".class", ".dll", ".dylib", ".exe", ".mo", ".o", ".pyc", ".pyd", ".pyo", ".so"),
    *(".bin", ".npy", ".npz", ".sqlite", ".pdf", ".safetensors", ".pt", ".pth", ".pkl", ".arrow"),
    *(".bmp", ".gif", ".ico", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp", ".eot", ".otf", ".ttf", ".woff"),
    *(".woff2", ".avi", ".mov", ".mp3", ".mp4", ".ogg", ".wav"),
}
_LONGEST_FIRST_LINE = 2**20  # bytes
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclasses.dataclass(frozen=True)
class FileKind:
    """How the documents of a file are stored.

    Attributes:
      name: the file's suffixes in lower case, such as ".jsonl.gz"; "no suffix" for a file without one.
      form: "lines" (a JSON object per line), "parquet", "text" (the whole file is one document), "tokens" (ids).
      compression: the suffix of the compression, or "".
    """

    name: str
    form: Form
    compression: str = ""


def kind_of(file: Path, fields: Sequence[str] = ("text",)) -> FileKind | None:
    """Returns how the documents of a file are stored, or None where it is no file of texts.

    Args:
      fields: a .json file whose first object has one of these fields holds JSON lines.

    Raises:
      UserError: the file is a .json that cannot be read. (JSON lines are often called so; see `is_json_lines`.)
    """
    suffixes = [suffix.lower() for suffix in file.suffixes]
    last = suffixes[-1] if suffixes else ""
    if last == PRETOKENISED:
        return FileKind(last, "tokens")
    if file.name.endswith(PRETOKENISED + SIDECAR) or last in _NOT_TEXT | _ARCHIVES:
        return None
    compression = last if last in _COMPRESSIONS else ""
    if compression:
        last = suffixes[-2] if len(suffixes) > 1 else ""
        if last not in _COMPRESSED_TEXT:
            return None
    name = last + compression or "no suffix"
    if last == ".parquet":
        return FileKind(name, "parquet")
    if last in _LINES or (last == ".json" and is_json_lines(file, fields, compression)):
        return FileKind(name, "lines", compression)
    return FileKind(name, "text", compression)


def why_left_out(file: Path) -> str:
    """Returns why `kind_of` returns None for a file."""
    suffix = file.suffix.lower()
    if suffix in _ARCHIVES or ".tar" in [each.lower() for each in file.suffixes]:
        return "an archive: unpack it"
    if suffix in _COMPRESSIONS:
        return "compressed, and its name does not say that it is text (.txt, .md) or JSON lines (.jsonl)"
    return "not text"


def is_json_lines(file: Path, fields: Sequence[str], compression: str = "") -> bool:
    """Returns whether the first line of a file that is not blank is a JSON object with one of the fields."""
    try:
        with open_decompressed(file, compression) as stream:
            while raw := stream.readline(_LONGEST_FIRST_LINE):
                if raw.strip():
                    break
    except (OSError, EOFError, lzma.LZMAError):  # reading the documents will say what is wrong
        return False
    try:
        row = json.loads(raw.removeprefix(BYTE_ORDER_MARK))
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and any(field in row for field in fields)


def open_decompressed(file: Path, compression: str) -> BinaryIO:
    """Opens a file for reading its bytes as they were before compression.

    Raises:
      UserError: it cannot be opened. What is wrong inside is an OSError, EOFError or lzma.LZMAError while reading.
    """
    raw = open_regular(file)
    match compression:
        case ".gz":
            return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
        case ".bz2":
            return cast(BinaryIO, bz2.BZ2File(raw))
        case ".xz":
            return cast(BinaryIO, lzma.LZMAFile(raw))
        case ".zst":
            import pyarrow

            return cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, pyarrow.CompressedInputStream(raw, "zstd"))))
        case _:
            return raw
