"""The files of a corpus, in a fixed order: Python's standard library, a file, or a folder."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

from dsv3_jax.data.config import DataConfig
from dsv3_jax.data.document_files import Document, count_documents, read_documents, sha256_of_file
from dsv3_jax.errors import UserError

STDLIB = "stdlib"
PRETOKENISED, SIDECAR = ".arrayrecord", ".json"

_FOLDERS_SKIPPED = {"__pycache__", "node_modules"}
# Left out: installed packages, folders that some installations or versions lack, and generated tables.
_STDLIB_SKIPPED = _FOLDERS_SKIPPED | {
    *("site-packages", "dist-packages"),
    *("test", "tests", "tkinter", "idlelib", "turtledemo", "ensurepip", "lib2to3"),
    *("encodings", "pydoc_data"),
}
# Generated when Python was built or installed. Without them, equal versions of Python have equal corpora.
_GENERATED = ("_sysconfigdata", "config-", "sitecustomize", "usercustomize")
# Files that folders of code often hold and that are not text. Every other file must be UTF-8.
_NOT_TEXT = {
    *(".a", ".class", ".dll", ".dylib", ".exe", ".jar", ".mo", ".o", ".pyc", ".pyd", ".pyo", ".so", ".whl"),
    *(".7z", ".bz2", ".gz", ".tar", ".xz", ".zip", ".zst", ".bin", ".npy", ".npz", ".sqlite", ".pdf"),
    *(".bmp", ".gif", ".ico", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp", ".eot", ".otf", ".ttf", ".woff"),
    *(".woff2", ".avi", ".mov", ".mp3", ".mp4", ".ogg", ".wav"),
}


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The files of a corpus, in a fixed order.

    Attributes:
      name: the corpus as the user gave it, for messages.
      root: the folder that document names are relative to, so that a corpus that is moved stays the same.
      files: sorted by name.
    """

    name: str
    root: Path
    files: tuple[Path, ...]

    @property
    def pretokenised(self) -> bool:
        """Whether the files hold token ids instead of text."""
        return bool(self.files) and self.files[0].suffix == PRETOKENISED

    def fingerprint(self) -> str:
        """Returns the SHA-256 over the names and contents of all files."""
        digest = hashlib.sha256()
        for file in self.files:
            label = self._label(file).encode("utf-8", "surrogateescape")  # names need not be UTF-8
            digest.update(label + f"\0{sha256_of_file(file)}\n".encode())
        return digest.hexdigest()

    def document_count(self) -> int:
        """Returns the number of documents that `documents` yields."""
        return sum(count_documents(file) for file in self.files)

    def documents(self) -> Iterator[Document]:
        """Yields all documents, file by file.

        Raises:
          UserError: a file cannot be read, is not UTF-8, or is not what its suffix says; the message names the place.
        """
        for file in self.files:
            yield from read_documents(file, self._label(file), self._domain(file))

    def _label(self, file: Path) -> str:
        return file.relative_to(self.root).as_posix()

    def _domain(self, file: Path) -> str:
        """Returns the name of the first folder below the root; for a file in the root itself, its suffix."""
        parts = file.relative_to(self.root).parts
        return parts[0] if len(parts) > 1 else file.suffix.lstrip(".") or "text"


def open_corpus(config: DataConfig) -> Corpus:
    """Finds the files of `config.corpus`.

    Raises:
      UserError: the path does not exist or cannot be read, or holds no text, or mixes text with tokenised files.
    """
    if config.corpus == STDLIB:
        return _stdlib()
    path = Path(config.corpus)
    try:
        if not path.exists():
            raise UserError(f"the corpus {path} does not exist; give 'stdlib' or the path of a file or folder")
        if path.is_dir():
            files = tuple(_walk(path, _may_be_text, _FOLDERS_SKIPPED))
            root = path
        elif path.is_file():
            files, root = (path,), path.parent
        else:
            raise UserError(f"the corpus {path} is neither a file nor a folder")
    except OSError as error:
        raise UserError(f"cannot read the corpus {path}: {error.strerror}") from error
    if not files:
        raise UserError(f"the corpus {path} is empty: it holds no text file")
    kinds = {file.suffix == PRETOKENISED for file in files}
    if len(kinds) > 1:
        raise UserError(f"the corpus {path} mixes {PRETOKENISED} files with text files; put them in separate folders")
    return Corpus(config.corpus, root, files)


def _stdlib() -> Corpus:
    root = Path(sysconfig.get_path("stdlib"))
    files = tuple(_walk(root, lambda file: _is_same_on_every_machine(file.relative_to(root)), _STDLIB_SKIPPED))
    if not files:
        raise UserError(f"this Python has no source code of its standard library in {root}; give another data.corpus")
    return Corpus(STDLIB, root, files)


def _is_same_on_every_machine(file: Path) -> bool:
    return file.suffix == ".py" and not file.parts[0].startswith(_GENERATED)


def _may_be_text(file: Path) -> bool:
    if file.exists() and not file.is_file():  # a pipe or a socket, whose end is never reached
        return False
    return file.suffix.lower() not in _NOT_TEXT and not file.name.endswith(PRETOKENISED + SIDECAR)


def _walk(root: Path, wanted: Callable[[Path], bool], skipped: set[str]) -> Iterator[Path]:
    """Yields the files below `root` that are `wanted`, sorted by name, without hidden ones and `skipped` folders."""

    def fail(error: OSError) -> None:
        raise UserError(f"cannot read the folder {error.filename}: {error.strerror}") from error

    found: list[Path] = []
    for folder, folders, names in os.walk(root, onerror=fail):
        folders[:] = [name for name in folders if name not in skipped and not name.startswith(".")]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    # Sorted by the path below the root as a string, which gives the same order on every machine.
    return iter(sorted((file for file in found if wanted(file)), key=lambda file: file.relative_to(root).as_posix()))
