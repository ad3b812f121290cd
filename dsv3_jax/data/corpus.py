"""The files of a corpus, in a fixed order: Python's standard library, a file, or a folder."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from dsv3_jax.data.config import DataConfig
from dsv3_jax.data.corpus_account import CorpusAccount, described
from dsv3_jax.data.document_files import Document, FileRow, count_documents, read_documents, read_rows, sha256_of_file
from dsv3_jax.data.file_kinds import PRETOKENISED, SIDECAR, TOKEN_BIN, FileKind, kind_of, why_left_out
from dsv3_jax.errors import UserError

STDLIB = "stdlib"

_FOLDERS_SKIPPED = {"__pycache__", "node_modules"}
# Left out: installed packages, folders that some installations or versions lack, and generated tables.
_STDLIB_SKIPPED = _FOLDERS_SKIPPED | {
    *("site-packages", "dist-packages"),
    *("test", "tests", "tkinter", "idlelib", "turtledemo", "ensurepip", "lib2to3"),
    *("encodings", "pydoc_data"),
}
# Generated when Python was built or installed. Without them, equal versions of Python have equal corpora.
_GENERATED = ("_sysconfigdata", "config-", "sitecustomize", "usercustomize")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The files of a corpus, in a fixed order.

    Attributes:
      name: the corpus as the user gave it, for messages.
      root: the folder that document names are relative to, so that a corpus that is moved stays the same.
      files: sorted by name, with the kind of each.
      left_out: why files and folders below the root are not read, with their names.
      refuses_nulls: whether a row whose text is null is an error.
    """

    name: str
    root: Path
    files: dict[Path, FileKind]
    left_out: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    refuses_nulls: bool = False

    @property
    def pretokenised(self) -> bool:
        """Whether the files hold token ids instead of text."""
        return any(kind.form == "tokens" for kind in self.files.values())

    def fingerprint(self) -> str:
        """Returns the SHA-256 over the names and contents of all files, and over how they are read."""
        digest = hashlib.sha256()
        for file, kind in self.files.items():
            label = self._label(file).encode("utf-8", "surrogateescape")  # names need not be UTF-8
            read_as = "\0lines" if kind.form == "lines" and kind.name != ".jsonl" else ""
            digest.update(label + f"\0{sha256_of_file(file)}{read_as}\n".encode())
        return digest.hexdigest()

    def document_count(self) -> int:
        """Returns the number of documents that `documents` yields, those whose text is null included."""
        return sum(count_documents(file, kind) for file, kind in self.files.items())

    def documents(self, account: CorpusAccount | None = None) -> Iterator[Document]:
        """Yields all documents, file by file. Rows whose text is null are passed over.

        Args:
          account: counts what is read.

        Raises:
          UserError: a file cannot be read, is not UTF-8, or is not what its suffix says; the message names the place.
        """
        for file, kind in self.files.items():
            if account is not None:
                account.add_file(kind)
            for document in read_documents(file, kind, self._label(file), self._domain(file)):
                if account is not None:
                    account.add(kind, document)
                if isinstance(document, Document):
                    yield document
                elif self.refuses_nulls:
                    raise UserError(f"{document.where}: the text is null; data.null_texts is refuse")

    def rows(self, needed: Sequence[str], others: Sequence[str]) -> Iterator[tuple[str, FileRow]]:
        """Yields the name and the row of each row of JSON lines and Parquet files; arguments as for `read_rows`."""
        for file, kind in self.files.items():
            for row in read_rows(file, kind, needed, others):
                yield f"{self._label(file)}:{row.number}", row

    def _label(self, file: Path) -> str:
        return file.relative_to(self.root).as_posix()

    def _domain(self, file: Path) -> str:
        """Returns the name of the first folder below the root; for a file in the root itself, its suffix."""
        parts = file.relative_to(self.root).parts
        return parts[0] if len(parts) > 1 else file.suffix.lstrip(".") or "text"


def open_corpus(config: DataConfig, fields: Sequence[str] = ("text",), *, rows_only: bool = False) -> Corpus:
    """Finds the files of `config.corpus`.

    Args:
      fields: a .json file whose first object has one of these fields holds JSON lines.
      rows_only: whether only JSON lines and Parquet files are read.

    Raises:
      UserError: the path does not exist or cannot be read, or holds no text, or mixes text with tokenised files.
    """
    if config.corpus == STDLIB:
        return _stdlib()
    path = Path(config.corpus)
    try:
        if not path.exists():
            raise UserError(f"the corpus {path} does not exist; give 'stdlib' or the path of a file or folder")
        left_out: dict[str, list[str]] = {}
        if path.is_dir():
            files, left_out = _walk(path, _FOLDERS_SKIPPED, fields)
            root = path
            if not files:  # beside texts, a .bin file is something else
                bins = sorted(path.rglob(f"*{TOKEN_BIN}"))
                files = {file: FileKind(TOKEN_BIN, "tokens") for file in bins if file.is_file()}
        elif path.is_file():
            kind = FileKind(TOKEN_BIN, "tokens") if path.suffix == TOKEN_BIN else kind_of(path, fields)
            if kind is None:
                raise UserError(f"the corpus {path} cannot be read: it is {why_left_out(path)}")
            files, root = {path: kind}, path.parent
        else:
            raise UserError(f"the corpus {path} is neither a file nor a folder")
    except OSError as error:
        raise UserError(f"cannot read the corpus {path}: {error.strerror}") from error
    if rows_only:
        others = [file for file, kind in files.items() if kind.form not in ("lines", "parquet")]
        if others:
            left_out["neither JSON lines nor Parquet"] = [file.relative_to(root).as_posix() for file in others]
        files = {file: kind for file, kind in files.items() if file not in others}
    if not files:
        wanted = "JSON lines or Parquet" if rows_only else "text"
        found = "; ".join(described(reason, names) for reason, names in left_out.items())
        raise UserError(f"the corpus {path} is empty: it holds no {wanted} file" + (f" ({found})" if found else ""))
    if len({kind.form == "tokens" for kind in files.values()}) > 1:
        raise UserError(f"the corpus {path} mixes {PRETOKENISED} files with text files; put them in separate folders")
    return Corpus(config.corpus, root, files, left_out, config.null_texts == "refuse")


def _stdlib() -> Corpus:
    root = Path(sysconfig.get_path("stdlib"))
    found, _ = _walk(root, _STDLIB_SKIPPED)
    files = {file: kind for file, kind in found.items() if _is_same_on_every_machine(file.relative_to(root))}
    if not files:
        raise UserError(f"this Python has no source code of its standard library in {root}; give another data.corpus")
    return Corpus(STDLIB, root, files)


def _is_same_on_every_machine(file: Path) -> bool:
    return file.suffix == ".py" and not file.parts[0].startswith(_GENERATED)


def _walk(
    root: Path, skipped: set[str], fields: Sequence[str] = ("text",)
) -> tuple[dict[Path, FileKind], dict[str, list[str]]]:
    """Returns the files of texts below `root`, sorted by name, and the names of what is left out, by the reason."""

    def fail(error: OSError) -> None:
        raise UserError(f"cannot read the folder {error.filename}: {error.strerror}") from error

    found: list[Path] = []
    left_out: dict[str, list[str]] = {}

    def leave_out(reason: str, path: Path) -> None:
        left_out.setdefault(reason, []).append(path.relative_to(root).as_posix())

    for folder, folders, names in os.walk(root, onerror=fail):
        kept = []
        for path in (Path(folder, name) for name in folders):
            if path.name.startswith("."):
                leave_out("hidden folders", path)
            elif path.name in skipped:
                leave_out("folders of programs", path)
            elif path.is_symlink():
                leave_out("folders that are links", path)
            else:
                kept.append(path.name)
        folders[:] = kept
        for path in (Path(folder, name) for name in names):
            if path.name.startswith("."):
                leave_out("hidden files", path)
            elif path.exists() and not path.is_file():  # a pipe or a socket, whose end is never reached
                leave_out("no regular files", path)
            else:
                found.append(path)
    files: dict[Path, FileKind] = {}
    # Sorted by the path below the root as a string, which gives the same order on every machine.
    for file in sorted(found, key=lambda file: file.relative_to(root).as_posix()):
        if (kind := kind_of(file, fields)) is not None:
            files[file] = kind
        elif not file.name.endswith(PRETOKENISED + SIDECAR):
            leave_out(f"{file.suffix.lower()}: {why_left_out(file)}", file)
    return files, {reason: sorted(left_out[reason]) for reason in sorted(left_out)}
