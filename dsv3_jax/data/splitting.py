"""Which documents are for validation: decided by their names alone, so that it never changes with order or machine."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Int64

from dsv3_jax.data.corpus import Corpus
from dsv3_jax.data.document_files import Document

TAIL = "#end"  # added to the name of a held-out end


def name_hash(name: str) -> float:
    """A number in [0, 1) from a name."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:6]) / 2.0**48


def holds_out_ends(document_count: int, fraction: float) -> bool:
    """Whether a corpus has too few documents to hold out whole ones."""
    return document_count * fraction < 1


def split_documents(corpus: Corpus, fraction: float) -> Iterator[tuple[Document, bool]]:
    """Every document, and whether it is held out.

    With fewer than 1 / fraction documents (one long file, for instance) the end of each is held out, from the start of
    a line where there is one.
    """
    if not holds_out_ends(corpus.document_count(), fraction):
        for document in corpus.documents():
            yield document, name_hash(document.name) < fraction
        return
    for document in corpus.documents():
        cut = _end_of_training(document.text, fraction)
        yield Document(document.name, document.domain, document.text[:cut]), False
        yield Document(document.name + TAIL, document.domain, document.text[cut:]), True


def enough_held_out(
    names: list[str], lengths: Int64[np.ndarray, " D"], held_out: Bool[np.ndarray, " D"], needed: int
) -> Bool[np.ndarray, " D"]:
    """Holds out more documents, those of the next hashes, until they have `needed` tokens.

    Only in small corpora, where chance may hold out nothing. As many tokens stay for training at least; where there
    are not that many, the result has too few as well.
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
