"""Trains a byte-level BPE tokenizer on the corpus, as the report describes in section 4.1."""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Iterable

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from dsv3_jax.data.control_tokens import LEADING, TRAILING
from dsv3_jax.errors import ConfigError

# Text is cut in this order before bytes are merged, and no token crosses a cut: numbers into at most three digits; runs
# of Chinese and Japanese; letters with one leading mark or space; punctuation with following line breaks; spaces.
NUMBERS = r"\p{N}{1,3}"
IDEOGRAPHS = r"[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_ASCII_MARKS = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""
WORDS = "|".join(
    (
        _ASCII_MARKS + r"[A-Za-z]+",
        r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
        r" ?[\p{P}\p{S}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)

BYTES = 256
SMALLEST_VOCABULARY = len(LEADING) + BYTES + len(TRAILING)
SAMPLE_BYTES = 6_000_000
_PIECE = 65_536  # characters; long documents are sampled in pieces, so that one file cannot fill the sample


def sample_text(documents: Iterable[tuple[str, str]], budget: int = SAMPLE_BYTES) -> list[str]:
    """Returns pieces of the documents, about `budget` characters together, chosen by a hash of their name and position.

    Args:
      documents: name and text of each document; they are read once, and only the sample is kept in memory.
      budget: characters of the sample.
    """
    chosen: list[tuple[int, str]] = []  # a heap whose top has the largest hash
    size = 0
    for name, text in documents:
        for start in range(0, len(text), _PIECE):
            digest = hashlib.sha256(f"{name}\0{start}".encode("utf-8", "surrogateescape")).digest()
            piece = text[start : start + _PIECE]
            heapq.heappush(chosen, (-int.from_bytes(digest[:16]), piece))
            size += len(piece)
            while size > budget and len(chosen) > 1:
                size -= len(heapq.heappop(chosen)[1])
    return [piece for _, piece in sorted(chosen, reverse=True)]


def train_bpe(texts: list[str], vocab_size: int) -> str:
    """Returns the tokenizer.json of a BPE with at most `vocab_size` ids, control tokens included.

    Raises:
      ConfigError: `vocab_size` is too small for the bytes and the control tokens.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ConfigError(
            f"data.vocab_size must be at least {SMALLEST_VOCABULARY} ({BYTES} bytes and "
            f"{len(LEADING) + len(TRAILING)} control tokens), not {vocab_size}"
        )
    tokenizer = _untrained()
    trainer = trainers.BpeTrainer(  # pyright: ignore[reportCallIssue]
        vocab_size=vocab_size - len(TRAILING),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=list(LEADING),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(list(TRAILING))
    return tokenizer.to_str()


def byte_tokenizer() -> str:
    """Returns the tokenizer.json with one id per byte, without merges, and with the same control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*LEADING, *alphabet])}
    tokenizer = _untrained(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens(list(LEADING))
    tokenizer.add_special_tokens(list(TRAILING))
    return json.dumps(json.loads(tokenizer.to_str()))


def _untrained(model: models.BPE | None = None) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(model or models.BPE())
    cuts = [
        pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated") for pattern in (NUMBERS, IDEOGRAPHS, WORDS)
    ]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, byte_level])  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return tokenizer
