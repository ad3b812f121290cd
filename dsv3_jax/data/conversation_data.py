"""Fine-tuning data of a run: conversations as tokens (cached), rows of whole samples, and the validation set.

A preference pair is two samples in a row, the chosen one first, which are packed, held out and counted together.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int64

from dsv3_jax.data.best_fit import best_fit, join_samples
from dsv3_jax.data.config import DataConfig
from dsv3_jax.data.conversation import NEEDED_FIELDS, OTHER_FIELDS, Sample, read_pair, read_sample
from dsv3_jax.data.corpus import Corpus, open_corpus
from dsv3_jax.data.corpus_account import described
from dsv3_jax.data.document_files import Document, FileRow
from dsv3_jax.data.packing import Row
from dsv3_jax.data.prepared import PACK_VERSION, Data, cache_key
from dsv3_jax.data.sample_tokens import SampleAccount, SampleEncoder, SampleTokens, with_chat_template
from dsv3_jax.data.splitting import name_hash
from dsv3_jax.data.token_store import TokenStore
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.data.tokenizer_training import byte_tokenizer
from dsv3_jax.data.train_iterator import RowSource
from dsv3_jax.errors import UserError

_ORDER, _ROWS = 0, 3  # streams of random numbers, as in `dsv3_jax.data.epoch`
_DECIDING = ("loss_on", "drop_unknown_roles", "drop_empty_turns", "drop_without_target", "drop_overlong")


def prepare_conversations(
    config: DataConfig,
    cache_folder: Path | None,
    tokenizer: Tokenizer | None,
    shard_index: int,
    shard_count: int,
    say: Callable[[str], None],
) -> ConversationData:
    """Reads and tokenises conversations; arguments and errors as for `prepare_data`."""
    corpus = open_corpus(config, NEEDED_FIELDS, rows_only=True)
    if tokenizer is None:
        byte = config.tokenizer == "byte"
        tokenizer = Tokenizer(byte_tokenizer(), "the byte tokenizer") if byte else Tokenizer.load(config.tokenizer)
    tokenizer = with_chat_template(tokenizer)
    fingerprint = corpus.fingerprint()
    key = cache_key(fingerprint, tokenizer.fingerprint, *_settings(config, tokenizer).values())
    kind = "pairs" if config.form == "preferences" else "samples"
    folder = cache_folder / f"{kind}-{key}" if cache_folder else None
    store = TokenStore.load(folder) if folder is not None else None
    if store is None:
        say(f"tokenising the conversations of {corpus.name}")
        store = _tokenise(corpus, config, tokenizer, say)
        if folder is not None:
            store = store.save(folder)
    return ConversationData(config, tokenizer, store, fingerprint, shard_index, shard_count)


def _settings(config: DataConfig, tokenizer: Tokenizer) -> dict[str, str]:
    """Returns what decides the tokens of the samples beside the corpus and the tokenizer, by name."""
    values = {name: str(getattr(config, name)) for name in _DECIDING}
    return {
        **values,
        "sequence_length": str(config.sequence_length),
        "validation_fraction": repr(float(config.validation_fraction)),
        "chat_template": hashlib.sha256(str(tokenizer.settings.chat_template).encode()).hexdigest(),
    }


def _tokenise(corpus: Corpus, config: DataConfig, tokenizer: Tokenizer, say: Callable[[str], None]) -> TokenStore:
    encoder, account = SampleEncoder(tokenizer, config), SampleAccount(config)

    def samples() -> Iterator[tuple[str, str, bool, np.ndarray]]:
        for name, row in corpus.rows(NEEDED_FIELDS, OTHER_FIELDS):
            some = _samples_of(row, config)
            if not some:
                account.rejected += 1
            elif not any(account.problem_of(sample, row.where) for sample in some):
                try:
                    encoded = [encoder.encode(sample) for sample in some]
                except UserError as error:
                    raise UserError(f"{row.where}: {error}") from error
                ids, learned = (np.concatenate(parts) for parts in zip(*encoded, strict=True))
                if not account.problem_of_tokens((ids, learned | (config.form == "preferences")), row.where):
                    account.used += 1
                    for ids, learned in encoded:
                        yield name, config.form, name_hash(name) < config.validation_fraction, 2 * ids + learned

    store = TokenStore.build(samples(), 2 * tokenizer.vocab_size)
    account.check()
    for line in account.describe():
        say(line)
    for reason, names in corpus.left_out.items():
        say(f"not read: {described(reason, names)}")
    if account.used < 2:
        raise UserError(
            f"{corpus.name} has {account.used} samples that can be used; give at least two, one of them to validate on"
        )
    return store


def _samples_of(row: FileRow, config: DataConfig) -> tuple[Sample, ...]:
    """Returns the sample of a row, or the two of a pair; none where the row says that nothing was kept."""
    if config.form == "preferences":
        return read_pair(row)
    sample = read_sample(row)
    return () if sample is None else (sample,)


@dataclasses.dataclass(frozen=True, eq=False)
class ConversationData(Data):
    """Prepared conversations. A number in the store is twice a token id, plus one where the token is learned."""

    def __post_init__(self) -> None:
        """Does nothing: rows need not be full."""

    @property
    def fingerprint(self) -> dict[str, str]:
        """Everything that decides the training rows, by name. Numbers of workers, shards and rows per batch do not."""
        return {
            "corpus": self.corpus_fingerprint,
            "tokenizer": self.tokenizer.fingerprint,
            **_settings(self.config, self.tokenizer),
            "seed": str(self.config.seed),
            "pack_version": PACK_VERSION,
        }

    @cached_property
    def num_train_tokens(self) -> int:
        """Number of tokens of the training samples, those that are read only included."""
        return int(_lengths(self.store, self._together)[~self._held_out].sum())

    @cached_property
    def row_source(self) -> RowSource:
        """The training rows of every epoch."""
        samples, config = np.flatnonzero(~self._held_out), self.config
        together, pad_id = self._together, self.tokenizer.pad_id
        length = config.sequence_length + 1
        return ConversationRows(self.store, samples, together, config.row_space, length, config.seed, pad_id)

    def readings(self, tokens: int) -> dict[str, float]:
        """Returns how often the samples are read by a run of so many tokens, padding included, by the corpus's name."""
        return {self.config.corpus: tokens / self.config.sequence_length / self.row_source.epoch(0).row_count}

    def documents(self, split: str = "train") -> Iterator[Document]:
        """Yields the samples of `split`, "train" or "validation", decoded from their tokens."""
        for index in np.flatnonzero(self._held_out == (split == "validation")):
            for number in range(int(index) * self._together, (int(index) + 1) * self._together):
                ids, _ = _sample(self.store, number)
                yield Document(self.store.names[number], self.store.domains[number], self.tokenizer.decode(ids))

    @property
    def _together(self) -> int:
        """How many samples are packed together: the two of a pair, or one."""
        return 2 if self.config.form == "preferences" else 1

    @property
    def _names(self) -> list[str]:
        return self.store.names[:: self._together]

    @cached_property
    def _held_out(self) -> Bool[np.ndarray, " D"]:
        """Which samples or pairs are held out: of few, at least one on each side."""
        held_out = self.store.held_out[:: self._together].copy()
        hashes = [name_hash(name) for name in self._names]
        held_out[int(np.argmin(hashes))] = True
        held_out[int(np.argmax(hashes))] = False
        return held_out

    @cached_property
    def _validation(self) -> tuple[np.ndarray, np.ndarray]:
        held_out, names = np.flatnonzero(self._held_out), self._names
        samples = np.array(sorted(held_out, key=lambda index: name_hash(names[index])), np.int64)
        packed = best_fit(_lengths(self.store, self._together)[samples].tolist(), self.config.row_space)
        count = min(len(packed), self.config.validation_sequences)
        chosen = [samples[packed[index * len(packed) // count]] for index in range(count)]
        space, pad_id = self.config.sequence_length + 1, self.tokenizer.pad_id
        rows = [join_samples(_samples(self.store, self._together, row), space, pad_id) for row in chosen]
        tokens, segment_ids = zip(*rows, strict=True)
        return np.stack(tokens), np.stack(segment_ids)


@dataclasses.dataclass(frozen=True)
class ConversationRows:
    """The training rows of every epoch.

    Attributes:
      store: all samples, as in `ConversationData`.
      samples: numbers of the training samples or pairs in the store.
      together: how many samples of the store each of them is.
      space: tokens of a row that they fill.
      length: tokens of a row, T + 1.
      seed: random seed of the order of samples and rows.
      pad_id: fills up rows.
    """

    store: TokenStore
    samples: Int64[np.ndarray, " D"]
    together: int
    space: int
    length: int
    seed: int
    pad_id: int

    def epoch(self, number: int) -> PackedEpoch:
        """Returns one pass over the samples."""
        return PackedEpoch(self, number)


class PackedEpoch:
    """One pass over the training samples, packed and shuffled by (seed, epoch) alone.

    Attributes:
      row_count: number of rows.
    """

    def __init__(self, source: ConversationRows, number: int) -> None:
        self._source = source
        samples = source.samples[np.random.default_rng([source.seed, number, _ORDER]).permutation(len(source.samples))]
        lengths = _lengths(source.store, source.together)[samples]
        self._rows = [samples[row] for row in best_fit(lengths.tolist(), source.space)]
        self.row_count = len(self._rows)
        self._order = np.random.default_rng([source.seed, number, _ROWS]).permutation(self.row_count)

    def row(self, index: int) -> Row:
        """Returns row `index` in the shuffled order: tokens and segment ids, int32 [T + 1] each."""
        source = self._source
        samples = _samples(source.store, source.together, self._rows[int(self._order[index])])
        return join_samples(samples, source.length, source.pad_id)


def _lengths(store: TokenStore, together: int) -> Int64[np.ndarray, " D"]:
    """Returns the number of tokens of every sample or pair."""
    return store.lengths.reshape(-1, together).sum(axis=1)


def _samples(store: TokenStore, together: int, numbers: Iterable[int]) -> list[SampleTokens]:
    """Returns the samples of a row: those of each number, one after the other."""
    return [_sample(store, int(number) * together + part) for number in numbers for part in range(together)]


def _sample(store: TokenStore, index: int) -> SampleTokens:
    numbers = store.document(index).astype(np.int64)
    return numbers >> 1, (numbers & 1).astype(bool)
