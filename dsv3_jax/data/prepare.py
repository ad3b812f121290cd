"""From a configuration to tokenizer, training rows and validation rows."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np

from dsv3_jax.data import corpus as corpora
from dsv3_jax.data.config import DataConfig
from dsv3_jax.data.corpus import Document
from dsv3_jax.data.fill_in_middle import cut_in_three
from dsv3_jax.data.iterator import TrainIterator
from dsv3_jax.data.packing import PackedRows, load_rows, pack, save_stream
from dsv3_jax.data.text_statistics import byte_entropy, gzip_bits_per_byte
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.errors import UserError

_TRAINING_SAMPLE = 3_000_000  # characters a tokenizer is trained on: seconds, and enough for some thousands of merges


@dataclasses.dataclass(frozen=True)
class Data:
    """A corpus ready for training.

    Attributes:
      tokenizer: of all texts.
      train, validation: packed rows; the validation text has no fill-in-middle and keeps its order.
      fingerprint: what the rows depend on, by name.
    """

    config: DataConfig
    tokenizer: Tokenizer
    train: PackedRows
    validation: PackedRows
    fingerprint: dict[str, str]
    shard_index: int = 0
    shard_count: int = 1

    @property
    def num_train_tokens(self) -> int:
        """Tokens of the training stream: one epoch."""
        return len(self.train.stream)

    def train_iterator(self) -> TrainIterator:
        """Shuffled training rows from the beginning."""
        return TrainIterator(
            self.train,
            seed=self.config.seed,
            shard_index=self.shard_index,
            shard_count=self.shard_count,
            worker_count=self.config.worker_count,
            fingerprint=self.fingerprint,
        )

    def validation_rows(self) -> tuple[np.ndarray, np.ndarray]:
        """The whole validation set: tokens and segment ids, int32 [N, T+1] each."""
        rows = [self.validation[index] for index in range(self._validation_count)]
        return np.stack([tokens for tokens, _ in rows]), np.stack([segments for _, segments in rows])

    @property
    def validation_entropy_bits_per_byte(self) -> float:
        """Zeroth-order byte entropy of the validation text."""
        return byte_entropy(self._validation_text)

    @property
    def validation_gzip_bits_per_byte(self) -> float:
        """Gzip on the validation text."""
        return gzip_bits_per_byte(self._validation_text)

    @property
    def _validation_count(self) -> int:
        return min(len(self.validation), self.config.validation_sequences)

    @cached_property
    def _validation_text(self) -> bytes:
        tokens = self.validation.stream[: self._validation_count * self.validation.sequence_length + 1]
        return self.tokenizer.decode(tokens).encode()


def prepare_data(
    config: DataConfig,
    cache_folder: Path | None,
    *,
    tokenizer_folder: Path | None = None,
    shard_index: int = 0,
    shard_count: int = 1,
    progress: Callable[[str], None] | None = None,
) -> Data:
    """Reads the corpus, makes or loads the tokenizer, tokenises and packs.

    Args:
      cache_folder: where the tokenised corpus is kept for the next time; None for not at all.
      tokenizer_folder: a saved tokenizer to use whatever the configuration says (a run that goes on).
      shard_index, shard_count: this host's share of the training rows.
      progress: told what is being done.

    Raises:
      UserError: the corpus or tokenizer cannot be used, or the corpus is too small for one row.
    """
    say = progress or (lambda text: None)
    documents = corpora.load_corpus(config.corpus)
    train, validation = corpora.split_corpus(documents, config.validation_fraction)
    say(f"corpus {config.corpus}: {len(train):,} documents to train on, {len(validation):,} to validate")
    tokenizer = _tokenizer(config, tokenizer_folder, train, say)
    if config.fill_in_middle_rate and tokenizer.fim_ids is None:
        raise UserError(
            "the tokenizer has no fill-in-middle tokens: give --data.fill-in-middle-rate 0 or another tokenizer"
        )
    fingerprint = {
        "corpus": corpora.fingerprint(documents),
        "tokenizer": tokenizer.fingerprint,
        **{
            name: str(getattr(config, name))
            for name in (
                "sequence_length",
                "fill_in_middle_rate",
                "punctuation_split_rate",
                "validation_fraction",
                "seed",
            )
        },
    }

    def rows(name: str, documents: list[Document], *, rearrange: bool) -> PackedRows:
        key = hashlib.sha256(f"{sorted(fingerprint.items())}".encode()).hexdigest()[:16]
        folder = None if cache_folder is None else cache_folder / f"{name}-{key}"
        cached = None if folder is None else load_rows(folder, config.sequence_length)
        if cached is None:
            say(f"tokenising the {name} documents")
            stream, starts = pack(_encode(documents, tokenizer, config, rearrange=rearrange), tokenizer.eos_id)
            if folder is not None:
                save_stream(folder, stream, starts)
            cached = PackedRows(stream, starts, config.sequence_length)
        if not len(cached):
            raise UserError(
                f"the corpus {config.corpus} is too small: its {name} part has {len(cached.stream)} tokens, one row "
                f"needs {config.sequence_length + 1}; give more text or a smaller --data.sequence-length"
            )
        return cached

    return Data(
        config=config,
        tokenizer=tokenizer,
        train=rows("train", _shuffled(train, config.seed), rearrange=True),
        validation=rows("validation", validation, rearrange=False),
        fingerprint=fingerprint,
        shard_index=shard_index,
        shard_count=shard_count,
    )


def _tokenizer(config: DataConfig, folder: Path | None, train: list[Document], say: Callable[[str], None]) -> Tokenizer:
    if folder is not None:
        return Tokenizer.load(folder)
    if config.tokenizer == "byte":
        return Tokenizer.of_bytes()
    if config.tokenizer != "train":
        return Tokenizer.load(config.tokenizer)
    if not any(document.text for document in train):
        raise UserError(
            f"the corpus {config.corpus} is tokens already: give --data.tokenizer the file they were made with"
        )
    say(f"training a byte-level BPE of {config.vocab_size} ids")
    return Tokenizer.train(_sample(train, _TRAINING_SAMPLE), config.vocab_size)


def _sample(documents: list[Document], characters: int) -> list[str]:
    """An even share of every document, so that no kind of text is left out."""
    total = sum(len(document.text) for document in documents)
    share = min(1.0, characters / max(total, 1))
    return [document.text[: max(1, round(len(document.text) * share))] for document in documents]


def _shuffled(documents: list[Document], seed: int) -> list[Document]:
    """Documents in random order, so that neighbours in a row are no relatives."""
    order = np.random.default_rng([seed, 1]).permutation(len(documents))
    return [documents[index] for index in order]


def _encode(
    documents: list[Document], tokenizer: Tokenizer, config: DataConfig, *, rearrange: bool
) -> list[list[int] | np.ndarray]:
    """Ids of every document; with `rearrange`, some by fill-in-middle and with joined punctuation split."""
    fim_rate = config.fill_in_middle_rate if rearrange else 0.0
    pieces: list[str] = []
    counts: list[int] = []
    for document in documents:
        random = _random_of(document, config.seed)
        cut = document.tokens is None and random.random() < fim_rate
        parts = cut_in_three(document.text, random) if cut else (document.text,)
        pieces += parts
        counts.append(len(parts))
    encoded = iter(tokenizer.encode_batch(pieces))
    results: list[list[int] | np.ndarray] = []
    for document, count in zip(documents, counts, strict=True):
        parts = [next(encoded) for _ in range(count)]
        if document.tokens is not None:
            largest = int(document.tokens.max(initial=0))
            if largest >= tokenizer.vocab_size:
                raise UserError(f"{document.name} holds id {largest}, beyond the tokenizer's {tokenizer.vocab_size}")
            results.append(document.tokens)
            continue
        if rearrange and config.punctuation_split_rate:
            random = _random_of(document, config.seed + 1)
            parts = [_split_punctuation(part, tokenizer, config.punctuation_split_rate, random) for part in parts]
        results.append(parts[0] if count == 1 else _fill_in_middle(parts, tokenizer))
    return results


def _fill_in_middle(parts: list[list[int]], tokenizer: Tokenizer) -> list[int]:
    assert tokenizer.fim_ids is not None
    begin, hole, end = tokenizer.fim_ids
    prefix, middle, suffix = parts
    return [begin, *prefix, hole, *suffix, end, *middle]


def _split_punctuation(tokens: list[int], tokenizer: Tokenizer, rate: float, random: np.random.Generator) -> list[int]:
    result: list[int] = []
    for token in tokens:
        parts = tokenizer.splits.get(token)
        result += parts if parts is not None and random.random() < rate else [token]
    return result


def _random_of(document: Document, seed: int) -> np.random.Generator:
    """Randomness of one document, the same whatever else the corpus holds."""
    digest = hashlib.sha256(document.name.encode()).digest()
    return np.random.default_rng([seed, int.from_bytes(digest[:8], "big")])
