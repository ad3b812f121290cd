"""Byte-level BPE in the report's manner (section 4.1), trained here or loaded from a published tokenizer.json."""

from __future__ import annotations

import gzip
import hashlib
import json
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from dsv3_jax.errors import UserError

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
FIM_BEGIN, FIM_HOLE, FIM_END = "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"
USER, ASSISTANT, THINK, END_THINK = "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"
SPECIAL_TOKENS = (BOS, EOS, PAD, FIM_BEGIN, FIM_HOLE, FIM_END, USER, ASSISTANT, THINK, END_THINK)
_OTHER_EOS = ("<|endoftext|>", "[EOS]", "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>")

SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)
_LARGEST_FILE = 256 * 2**20

# Digits by threes; runs of Chinese characters and kana; then words with one sign before them, signs with the line
# breaks after them, and white space.
_DIGITS = r"\p{N}{1,3}"
_EAST_ASIAN = r"[一-龥぀-ゟ゠-ヿ]+"
_WORDS = r"[\p{P}\p{S}][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class Tokenizer:
    """Text to ids and back.

    Attributes:
      vocab_size: one more than the largest id.
      eos_id: ends every document.   bos_id, fim_ids: None where the vocabulary has no such tokens.
      fingerprint: SHA-256 of the tokenizer's definition.
    """

    def __init__(self, backend: tokenizers.Tokenizer):
        self._backend = backend
        vocabulary = backend.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise UserError("the tokenizer has an empty vocabulary")
        self.vocab_size = max(vocabulary.values()) + 1
        if self.vocab_size > 2**24:
            raise UserError(f"the tokenizer has an id of {self.vocab_size - 1}, beyond any vocabulary")
        self.bos_id = vocabulary.get(BOS)
        eos = next((vocabulary[name] for name in (EOS, *_OTHER_EOS) if name in vocabulary), None)
        if eos is None:
            raise UserError(f"the tokenizer has no end-of-text token: none of {', '.join((EOS, *_OTHER_EOS))}")
        self.eos_id: int = eos
        fim = [vocabulary.get(name) for name in (FIM_BEGIN, FIM_HOLE, FIM_END)]
        self.fim_ids: tuple[int, int, int] | None = None if None in fim else tuple(fim)  # pyright: ignore
        self.fingerprint = hashlib.sha256(backend.to_str().encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens around it."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts, on all cores."""
        return [one.ids for one in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of ids; special tokens are left out, bytes that are no UTF-8 become the replacement character."""
        return self._backend.decode([int(token) for token in ids], skip_special_tokens=True)

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """Bytes of text each id stands for: int32 [vocab_size]; 0 for special tokens and unused ids."""
        sizes = np.zeros(self.vocab_size, np.int32)
        added = self._backend.get_added_tokens_decoder()
        for token, index in self._backend.get_vocab(with_added_tokens=True).items():
            if index not in added:
                sizes[index] = len(token)  # a byte-level vocabulary writes one character a byte
            elif not added[index].special:
                sizes[index] = len(token.encode())
        return sizes

    @cached_property
    def splits(self) -> dict[int, list[int]]:
        """Ids that join punctuation with line breaks, and the ids of their two parts encoded apart."""
        found = {}
        for index in range(self.vocab_size):
            text = self._backend.decode([index], skip_special_tokens=True)
            signs = text.rstrip("\r\n")
            if signs and signs != text and all(unicodedata.category(sign)[0] in "PS" for sign in signs.strip()):
                found[index] = self.encode(signs) + self.encode(text[len(signs) :])
        return found

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json into a folder, which is made."""
        folder.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(folder / "tokenizer.json"))

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Reads a tokenizer.json (or .json.gz), or the one in a folder.

        Raises:
          UserError: there is none, or the file is not one.
        """
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        try:
            if file.stat().st_size > _LARGEST_FILE:
                raise UserError(f"{file} is larger than any tokenizer: {file.stat().st_size} bytes")
            with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as opened:
                content = opened.read(_LARGEST_FILE)
        except (OSError, EOFError) as error:
            raise UserError(f"the tokenizer {file} cannot be read: {error}") from error
        try:
            json.loads(content)
            return cls(tokenizers.Tokenizer.from_str(content.decode()))
        except UserError as error:
            raise UserError(f"{file}: {error}") from error
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises bare Exceptions, and panics that are not even those
            raise UserError(f"{file} is not a tokenizer: {str(error).splitlines()[0][:120]}") from error

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Byte-level BPE of `vocab_size` ids, special tokens included."""
        if vocab_size < SMALLEST_VOCABULARY:
            raise UserError(
                f"data.vocab_size must be at least {SMALLEST_VOCABULARY} (256 bytes and {len(SPECIAL_TOKENS)} special "
                f"tokens), not {vocab_size}"
            )
        backend = _backend()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend)

    @classmethod
    def of_bytes(cls) -> Tokenizer:
        """One id a byte, after the special tokens."""
        return cls.train([], SMALLEST_VOCABULARY)


def _backend() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in (_DIGITS, _EAST_ASIAN, _WORDS)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return backend
