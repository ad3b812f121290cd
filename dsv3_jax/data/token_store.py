"""Tokenised documents joined end to end, in memory or memory-mapped from a folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64

from dsv3_jax.errors import UserError, reason_of

_TOKENS, _BORDERS, _DOCUMENTS = "tokens.npy", "borders.npy", "documents.json"
_SUMMARY = "summary.json"


class TokenStore:
    """Documents as ids, none of them empty, without end-of-text tokens.

    A store on disk is pickled as its path, without its tokens, so that worker processes map the same memory.

    Attributes:
      tokens: ids of all documents, uint16 or uint32 [N].
      borders: int64 [D + 1]; document d is tokens[borders[d]:borders[d + 1]].
      names: names of the D documents.
      domains: domains of the D documents.
      held_out: which documents are held out for validation, bool [D].
    """

    def __init__(
        self,
        tokens: np.ndarray,
        borders: Int64[np.ndarray, " D_plus_1"],
        names: list[str],
        domains: list[str],
        held_out: Bool[np.ndarray, " D"],
        path: Path | None = None,
    ) -> None:
        self.tokens, self.borders = tokens, borders
        self.names, self.domains, self.held_out = names, domains, held_out
        self._path = path

    def __len__(self) -> int:
        return len(self.names)

    @property
    def lengths(self) -> Int64[np.ndarray, " D"]:
        """Number of tokens of each document."""
        return np.diff(self.borders)

    def document(self, index: int) -> np.ndarray:
        """Returns the ids of one document, without copying them."""
        return self.tokens[self.borders[index] : self.borders[index + 1]]

    def __getstate__(self) -> dict[str, Any]:
        if self._path is None:
            return self.__dict__
        return {**self.__dict__, "tokens": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.tokens is None and self._path is not None:
            self.tokens = np.load(self._path / _TOKENS, mmap_mode="r")

    @classmethod
    def build(cls, documents: Iterable[tuple[str, str, bool, np.ndarray]], vocab_size: int) -> TokenStore:
        """Makes a store from (name, domain, held out, ids) of each document. Empty documents are left out."""
        dtype = np.uint16 if vocab_size <= 2**16 else np.uint32
        parts, names, domains, held_out = [], [], [], []
        for name, domain, held, ids in documents:
            if len(ids):
                parts.append(np.asarray(ids, dtype))
                names.append(name)
                domains.append(domain)
                held_out.append(held)
        borders = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)
        tokens = np.concatenate(parts) if parts else np.zeros(0, dtype)
        return cls(tokens, borders, names, domains, np.array(held_out, bool))

    def save(self, folder: Path) -> TokenStore:
        """Writes the store to `folder` and returns it memory-mapped from there. Two processes may do so at once.

        Raises:
          UserError: the folder cannot be written.
        """
        temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
        try:
            temporary.mkdir(parents=True)
            np.save(temporary / _TOKENS, self.tokens)
            np.save(temporary / _BORDERS, self.borders)
            listing = {"names": self.names, "domains": self.domains, "held_out": self.held_out.tolist()}
            (temporary / _DOCUMENTS).write_text(json.dumps(listing), encoding="utf-8")
            digests = {name: _digest(temporary / name) for name in (_TOKENS, _BORDERS, _DOCUMENTS)}
            (temporary / _SUMMARY).write_text(json.dumps({"sha256": digests}), encoding="utf-8")
            if folder.exists() and self.load(folder) is None:  # a damaged one
                shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():
                os.rename(temporary, folder)
        except OSError as error:
            if not folder.is_dir():  # otherwise another process has just written the same content
                raise UserError(f"cannot write the tokenised corpus to {folder}: {reason_of(error)}") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return self.load(folder) or self

    @classmethod
    def load(cls, folder: Path) -> TokenStore | None:
        """Loads the store in `folder`; None where it is absent, incomplete or damaged (its digests are checked)."""
        try:
            digests = json.loads((folder / _SUMMARY).read_text(encoding="utf-8"))["sha256"]
            if any(_digest(folder / name) != digests[name] for name in (_TOKENS, _BORDERS, _DOCUMENTS)):
                return None
            listing = json.loads((folder / _DOCUMENTS).read_text(encoding="utf-8"))
            tokens = np.load(folder / _TOKENS, mmap_mode="r")
            borders = np.load(folder / _BORDERS)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        held_out = np.array(listing["held_out"], bool)
        return cls(tokens, borders, listing["names"], listing["domains"], held_out, folder)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
