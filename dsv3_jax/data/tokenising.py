"""Tokenises a corpus. It needs memory for a few documents at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import batched

import numpy as np

from dsv3_jax.data.array_record import read_array_record
from dsv3_jax.data.corpus import Corpus
from dsv3_jax.data.corpus_account import CorpusAccount
from dsv3_jax.data.file_kinds import TOKEN_BIN
from dsv3_jax.data.splitting import name_hash, split_documents
from dsv3_jax.data.token_bins import is_held_out, read_token_bin
from dsv3_jax.data.tokenizer import Tokenizer

TokenisedDocument = tuple[str, str, bool, np.ndarray]  # name, domain, held out, ids

_DOCUMENTS_PER_BATCH = 64
_PIECES_PER_BATCH = 64
_PIECE = 2**20  # characters; the tokenizers library needs some hundred bytes per token of a text it encodes
# The report's pre-tokenizer always cuts here, so that cutting a text here does not change its tokens.
_SAFE_CUT = re.compile(r"\n(?=[A-Za-z])")


def tokenise(
    corpus: Corpus, validation_fraction: float, tokenizer: Tokenizer, account: CorpusAccount | None = None
) -> Iterator[TokenisedDocument]:
    """Yields name, domain, whether it is held out, and ids of every document. Tokenised corpora are only read.

    Args:
      account: counts what is read of a corpus of texts.

    Raises:
      UserError: a file cannot be used; the message names the file and the place in it.
    """
    if corpus.pretokenised:
        yield from _read_tokens(corpus, validation_fraction, tokenizer)
        return
    for batch in batched(split_documents(corpus, validation_fraction, account), _DOCUMENTS_PER_BATCH):
        pieces = [cut_text(document.text) for document, _ in batch]
        encoded = _encode([piece for cut in pieces for piece in cut], tokenizer)
        for (document, held_out), cut in zip(batch, pieces, strict=True):
            ids = np.concatenate([next(encoded) for _ in cut])
            yield document.name, document.domain, held_out, ids


def _read_tokens(corpus: Corpus, validation_fraction: float, tokenizer: Tokenizer) -> Iterator[TokenisedDocument]:
    """Yields the documents of files that hold ids. If some files say that they are held out, nothing else is."""
    bins = [file for file, kind in corpus.files.items() if kind.name == TOKEN_BIN]
    chosen = any(is_held_out(file) for file in bins)
    for file in corpus.files:
        if file not in bins:
            for name, domain, ids in read_array_record(file, tokenizer):
                yield name, domain, name_hash(name) < validation_fraction, ids
            continue
        label = file.relative_to(corpus.root).as_posix()
        for number, ids in enumerate(read_token_bin(file, tokenizer)):
            name = f"{label}:{number}"
            held_out = is_held_out(file) if chosen else name_hash(name) < validation_fraction
            yield name, file.stem, held_out, ids


def cut_text(text: str, size: int = _PIECE) -> list[str]:
    """Cuts a text into pieces of `size` to 2 `size` characters, at the starts of lines where possible."""
    pieces, start = [], 0
    while len(text) - start > 2 * size:
        match = _SAFE_CUT.search(text, start + size, start + 2 * size)
        stop = match.end() if match else start + size
        pieces.append(text[start:stop])
        start = stop
    return [*pieces, text[start:]]


def _encode(pieces: list[str], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    for group in batched(pieces, _PIECES_PER_BATCH):
        yield from (np.array(ids, np.uint32) for ids in tokenizer.encode_batch(group))
