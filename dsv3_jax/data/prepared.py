"""A prepared corpus: its tokens, its training rows and its fixed validation set."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Int32, Int64

from dsv3_jax.data.config import DataConfig
from dsv3_jax.data.document_files import Document
from dsv3_jax.data.epoch import RowSettings
from dsv3_jax.data.fill_in_middle import FillInMiddle
from dsv3_jax.data.packing import pack_row
from dsv3_jax.data.punctuation_splitting import PunctuationSplitting
from dsv3_jax.data.splitting import enough_held_out, name_hash
from dsv3_jax.data.text_statistics import byte_entropy, gzip_bits_per_byte
from dsv3_jax.data.token_store import TokenStore
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.data.train_iterator import EndlessRows, RowSource, TrainIterator
from dsv3_jax.errors import UserError

PACK_VERSION = "1"  # of everything between text and rows; changing it invalidates old caches and iterator states


@dataclasses.dataclass(frozen=True, eq=False)
class Data:
    """A prepared corpus. `prepare_data` makes it.

    Attributes:
      config: the configuration.
      tokenizer: the tokenizer.
      store: all documents as token ids.
      corpus_fingerprint: SHA-256 of the corpus.
      shard_index: number of this host's part of the training rows, from 0.
      shard_count: number of parts of the training rows.
      begins_rows: whether each validation row begins with the begin-of-text token, as published models expect, and
        then holds T tokens of text, all of which are targets.
    """

    config: DataConfig
    tokenizer: Tokenizer
    store: TokenStore
    corpus_fingerprint: str
    shard_index: int = 0
    shard_count: int = 1
    begins_rows: bool = False

    def __post_init__(self) -> None:
        for split, count in (("training", self.num_train_tokens), ("validation", self._validation_borders[-1])):
            if count < self.config.sequence_length + 1:
                raise UserError(
                    f"the corpus {self.config.corpus} is too small: its {count} {split} tokens do not fill one "
                    f"sequence of {self.config.sequence_length}; give more text or a smaller data.sequence_length"
                )
        _ = self.row_source  # raises now if the tokenizer has no fill-in-middle tokens

    @property
    def fingerprint(self) -> dict[str, str]:
        """Everything that decides the training rows, by name. Numbers of workers, shards and rows per batch do not."""
        config = self.config
        return {
            "corpus": self.corpus_fingerprint,
            "tokenizer": self.tokenizer.fingerprint,
            "sequence_length": str(config.sequence_length),
            "fill_in_middle_rate": repr(float(config.fill_in_middle_rate)),
            "punctuation_split_rate": repr(float(config.punctuation_split_rate)),
            "validation_fraction": repr(float(config.validation_fraction)),
            "seed": str(config.seed),
            "pack_version": PACK_VERSION,
        }

    @cached_property
    def num_train_tokens(self) -> int:
        """Number of tokens of the training documents, with end-of-text tokens, without those of fill-in-middle."""
        return int((self.store.lengths[self._train_documents] + 1).sum())

    def rows_of(self, epochs: float) -> int:
        """Returns the number of training rows of the first so many epochs, at least 1."""
        rows = EndlessRows(self.row_source)
        whole, part = int(epochs), epochs % 1.0
        starts = [rows.start_of(number) for number in (whole, whole + 1)]
        return max(1, round(starts[0] + part * (starts[1] - starts[0])))

    def readings(self, tokens: int) -> dict[str, float]:
        """Returns how often the corpus is read by a run of so many tokens, by its name."""
        return {self.config.corpus: tokens / self.num_train_tokens}

    def train_iterator(self) -> TrainIterator:
        """Returns an iterator over this shard's rows, at the start. Over all shards an epoch has each row once."""
        rows, config = EndlessRows(self.row_source), self.config
        return TrainIterator(rows, self.fingerprint, self.shard_index, self.shard_count, config.worker_count)

    def validation_rows(self) -> tuple[Int32[np.ndarray, "N T_plus_1"], Int32[np.ndarray, "N T_plus_1"]]:
        """Returns tokens and segment ids of the validation set: full rows, evenly spaced over the held-out text."""
        return self._validation

    def documents(self, split: str = "train") -> Iterator[Document]:
        """Yields the documents of `split`, "train" or "validation", decoded from their tokens."""
        wanted = {"train": self._train_documents, "validation": self._validation_documents}[split]
        for index in wanted:
            text = self.tokenizer.decode(self.store.document(int(index)))
            yield Document(self.store.names[index], self.store.domains[index], text)

    @cached_property
    def validation_entropy_bits_per_byte(self) -> float:
        """Baseline: bits per byte of the validation targets for a code that knows only how frequent each byte is."""
        return byte_entropy(self._validation_text)

    @cached_property
    def validation_gzip_bits_per_byte(self) -> float:
        """Baseline: bits per byte of the validation targets compressed by gzip -9."""
        return gzip_bits_per_byte(self._validation_text)

    @cached_property
    def _held_out(self) -> Bool[np.ndarray, " D"]:
        store = self.store
        return enough_held_out(store.names, store.lengths + 1, store.held_out, self.config.sequence_length + 1)

    @cached_property
    def _train_documents(self) -> Int64[np.ndarray, " D"]:
        return np.flatnonzero(~self._held_out)

    @cached_property
    def _validation_documents(self) -> Int64[np.ndarray, " D"]:
        """Held-out documents in the order of their hashes, which mixes them and does not depend on other documents."""
        held_out = np.flatnonzero(self._held_out)
        return np.array(sorted(held_out, key=lambda index: name_hash(self.store.names[index])), np.int64)

    @cached_property
    def _validation_borders(self) -> Int64[np.ndarray, " D_plus_1"]:
        lengths = self.store.lengths[self._validation_documents] + 1
        return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)

    @cached_property
    def _validation(self) -> tuple[np.ndarray, np.ndarray]:
        length, borders = self.config.sequence_length, self._validation_borders
        full = (int(borders[-1]) - 1) // length
        count = min(full, self.config.validation_sequences)
        eos = self.tokenizer.eos_id

        def read(position: int, start: int, stop: int) -> np.ndarray:
            ids = self.store.document(int(self._validation_documents[position]))
            return np.append(ids[start:stop], [eos] * (stop - max(start, len(ids))))

        rows = [pack_row(index * full // count, borders, read, length, self.tokenizer.pad_id) for index in range(count)]
        tokens, segment_ids = map(np.stack, zip(*rows, strict=True))
        if self.begins_rows:
            tokens = np.insert(tokens[:, :-1], 0, self.tokenizer.bos_id, axis=1)
            segment_ids = np.insert(segment_ids[:, :-1], 0, segment_ids[:, 0], axis=1)
        return tokens, segment_ids

    @cached_property
    def _validation_text(self) -> bytes:
        """The text of the validation targets, row after row, as bytes."""
        tokens, segment_ids = self._validation
        targets = tokens[:, 1:][segment_ids[:, 1:] > 0]
        return self.tokenizer.to_bytes(targets[self.tokenizer.token_bytes[targets] > 0])

    @cached_property
    def row_source(self) -> RowSource:
        """The training rows of every epoch."""
        config, tokenizer = self.config, self.tokenizer
        return RowSettings(
            store=self.store,
            documents=self._train_documents,
            sequence_length=config.sequence_length,
            seed=config.seed,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
            fill_in_middle_rate=config.fill_in_middle_rate,
            fill_in_middle=FillInMiddle(tokenizer) if config.fill_in_middle_rate else None,
            splitting_rate=config.punctuation_split_rate,
            splitting=PunctuationSplitting(tokenizer) if config.punctuation_split_rate else None,
        )


def cache_key(*parts: str) -> str:
    """Returns a name for what is made of these parts, in which `PACK_VERSION` counts too."""
    return hashlib.sha256(json.dumps([PACK_VERSION, *parts]).encode()).hexdigest()[:24]
