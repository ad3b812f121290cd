"""Decides which documents are held out for validation, by their names alone: order and machine do not matter."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Int64

from dsv3_jax.data.corpus import Corpus
from dsv3_jax.data.corpus_account import CorpusAccount
from dsv3_jax.data.document_files import Document

TAIL = "#end"  # added to the name of a document whose end is held out


def name_hash(name: str) -> float:
    """Returns a number in [0, 1) that depends only on the name."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:6]) / 2.0**48


def holds_out_ends(document_count: int, fraction: float) -> bool:
    """Returns whether a corpus has too few documents to hold out whole ones."""
    return document_count * fraction < 1


def split_documents(
    corpus: Corpus, fraction: float, account: CorpusAccount | None = None
) -> Iterator[tuple[Document, bool]]:
    """Yields every document, and whether it is held out.

    If there are fewer than 1 / fraction documents (for instance one long file), the end of each is held out, from the
    start of a line if possible.

    Args:
      fraction: fraction of the documents to hold out.
      account: counts what is read.
    """
    if not holds_out_ends(corpus.document_count(), fraction):
        for document in corpus.documents(account):
            yield document, name_hash(document.name) < fraction
        return
    for document in corpus.documents(account):
        cut = _end_of_training(document.text, fraction)
        yield Document(document.name, document.domain, document.text[:cut]), False
        yield Document(document.name + TAIL, document.domain, document.text[cut:]), True


def enough_held_out(
    names: list[str], lengths: Int64[np.ndarray, " D"], held_out: Bool[np.ndarray, " D"], needed: int
) -> Bool[np.ndarray, " D"]:
    """Holds out more documents, in the order of their hashes, until they have `needed` tokens together.

    This matters only in small corpora, where chance may hold out nothing. At least `needed` tokens are left for
    training; a corpus with too few tokens for both ends up with too few held out.

    Args:
      names: names of the documents.
      lengths: number of tokens of each document.
      held_out: which documents are held out already.
      needed: number of tokens that should be held out.
    """
    held_out = held_out.copy()
    if lengths[held_out].sum() >= needed:
        return held_out
    for index in sorted(np.flatnonzero(~held_out).tolist(), key=lambda index: name_hash(names[index])):
        if lengths[held_out].sum() >= needed:
            break
        if lengths[~held_out].sum() - lengths[index] >= needed:
            held_out[index] = True
    return held_out


def _end_of_training(text: str, fraction: float) -> int:
    size = len(text)
    earliest = size - int(size * fraction)
    line = text.find("\n", earliest) + 1
    return line if 0 < line <= earliest + (size - earliest) // 2 else earliest
