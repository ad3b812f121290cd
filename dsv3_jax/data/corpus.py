"""Documents: from the standard library, folders, JSON lines, Parquet or token records; and their split."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dsv3_jax.errors import UserError

# Not the library itself, of a size that swings between installations, or tables rather than code.
_LEFT_OUT = {
    *("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3"),
    *("encodings", "pydoc_data"),
}
_TEXT_SUFFIXES = {
    *(".c", ".cc", ".cfg", ".cpp", ".css", ".go", ".h", ".hpp", ".html", ".java", ".js", ".json", ".jl", ".kt"),
    *(".md", ".py", ".r", ".rb", ".rs", ".rst", ".sh", ".sql", ".swift", ".tex", ".toml", ".ts", ".txt", ".xml"),
    *(".yaml", ".yml"),
}


@dataclasses.dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
      name: unique in its corpus; decides the split.
      domain: what kind of text it is: package or suffix.
      text: its content; empty where only tokens are known.
      tokens: ids, where the corpus came tokenised.
    """

    name: str
    domain: str
    text: str
    tokens: np.ndarray | None = None


def load_corpus(corpus: str) -> list[Document]:
    """All documents of a corpus, in the order of their names.

    Raises:
      UserError: it does not exist, cannot be read, is not UTF-8 or holds no text.
    """
    if corpus == "stdlib":
        return _named_files(Path(sysconfig.get_paths()["stdlib"]), stdlib=True)
    path = Path(corpus)
    if not path.exists():
        raise UserError(f"the corpus {corpus} does not exist; give a folder or file, or stdlib")
    if path.is_dir():
        documents = _named_files(path, stdlib=False)
    elif path.suffix == ".jsonl":
        documents = list(_json_lines(path))
    elif path.suffix == ".parquet":
        documents = list(_parquet(path))
    elif path.suffix == ".arrayrecord":
        documents = list(_token_records(path))
    else:
        documents = [Document(name=path.name, domain=path.suffix.lstrip("."), text=_read_text(path))]
    documents = [document for document in documents if document.text or document.tokens is not None]
    if not documents:
        raise UserError(f"the corpus {corpus} holds no text")
    return documents


def split_corpus(documents: list[Document], validation_fraction: float) -> tuple[list[Document], list[Document]]:
    """Training and validation documents, by a hash of each name: adding a document moves no other.

    A single document is cut instead, its end kept for validation.
    """
    if len(documents) == 1 and documents[0].tokens is None:
        only = documents[0]
        cut = round(len(only.text) * (1.0 - validation_fraction))
        return [dataclasses.replace(only, text=only.text[:cut])], [dataclasses.replace(only, text=only.text[cut:])]
    train: list[Document] = []
    validation: list[Document] = []
    for document in documents:
        share = int.from_bytes(hashlib.sha256(document.name.encode()).digest()[:8], "big") / 2**64
        (validation if share < validation_fraction else train).append(document)
    if not validation:
        validation.append(train.pop())
    if not train:
        train.append(validation.pop())
    return train, validation


def fingerprint(documents: list[Document]) -> str:
    """SHA-256 over names and contents."""
    digest = hashlib.sha256()
    for document in documents:
        content = document.text.encode() if document.tokens is None else document.tokens.tobytes()
        digest.update(f"{document.name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def _named_files(folder: Path, *, stdlib: bool) -> list[Document]:
    documents = []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if not path.is_file() or any(part.startswith(".") for part in relative.parts):
            continue
        if stdlib:
            if path.suffix != ".py" or _LEFT_OUT & set(relative.parts):
                continue
            domain = relative.parts[0].removesuffix(".py")
        else:
            if path.suffix.lower() not in _TEXT_SUFFIXES:
                continue
            domain = path.suffix.lower().lstrip(".")
        text = _read_text(path)
        if text:
            documents.append(Document(name=relative.as_posix(), domain=domain, text=text))
    if not documents:
        kinds = ".py" if stdlib else "text or code"
        raise UserError(f"the corpus {folder} holds no {kinds} files with text in them")
    return documents


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    return _decode(content, str(path))


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8: byte {error.start} is 0x{content[error.start]:02x}") from None


def _json_lines(path: Path) -> Iterator[Document]:
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise UserError(f"{path} line {number} is not JSON") from None
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise UserError(f"{path} line {number} has no field 'text' that holds a string")
        domain = record.get("domain", "jsonl")
        yield Document(name=f"{path.name}:{number}", domain=str(domain), text=record["text"])


def _parquet(path: Path) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from error
    if "text" not in table.column_names:
        raise UserError(f"{path} has no column 'text'; it has {', '.join(table.column_names)}")
    domains = table.column("domain").to_pylist() if "domain" in table.column_names else None
    for number, text in enumerate(table.column("text").to_pylist()):
        if not isinstance(text, str):
            raise UserError(f"{path} row {number} of column 'text' holds no string")
        domain = str(domains[number]) if domains else "parquet"
        yield Document(name=f"{path.name}:{number}", domain=domain, text=text)


def _token_records(path: Path) -> Iterator[Document]:
    from dsv3_jax.data.token_records import read_token_records

    for number, tokens in enumerate(read_token_records(path)):
        yield Document(name=f"{path.name}:{number}", domain="arrayrecord", text="", tokens=tokens)
