"""Fine-tuning data of a run: conversations as tokens (cached), rows of whole samples, and the validation set."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int64

from dsv3_jax.data.best_fit import best_fit, join_samples
from dsv3_jax.data.config import DataConfig
from dsv3_jax.data.conversation import NEEDED_FIELDS, OTHER_FIELDS, read_sample
from dsv3_jax.data.corpus import Corpus, open_corpus
from dsv3_jax.data.corpus_account import described
from dsv3_jax.data.document_files import Document
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
    folder = cache_folder / f"samples-{key}" if cache_folder else None
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
            sample = read_sample(row)
            if sample is None:
                account.rejected += 1
            elif not account.problem_of(sample, row.where):
                try:
                    ids, learned = encoder.encode(sample)
                except UserError as error:
                    raise UserError(f"{row.where}: {error}") from error
                if not account.problem_of_tokens((ids, learned), row.where):
                    account.used += 1
                    yield name, "conversations", name_hash(name) < config.validation_fraction, 2 * ids + learned

    store = TokenStore.build(samples(), 2 * tokenizer.vocab_size)
    account.check()
    for line in account.describe():
        say(line)
    for reason, names in corpus.left_out.items():
        say(f"not read: {described(reason, names)}")
    if len(store) < 2:
        raise UserError(
            f"{corpus.name} has {len(store)} samples that can be used; give at least two, one of them to validate on"
        )
    return store


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
        return int(self.store.lengths[~self._held_out].sum())

    @cached_property
    def row_source(self) -> RowSource:
        """The training rows of every epoch."""
        samples, config = np.flatnonzero(~self._held_out), self.config
        return ConversationRows(self.store, samples, config.sequence_length + 1, config.seed, self.tokenizer.pad_id)

    def readings(self, tokens: int) -> dict[str, float]:
        """Returns how often the samples are read by a run of so many tokens, padding included, by the corpus's name."""
        return {self.config.corpus: tokens / self.config.sequence_length / self.row_source.epoch(0).row_count}

    def documents(self, split: str = "train") -> Iterator[Document]:
        """Yields the samples of `split`, "train" or "validation", decoded from their tokens."""
        for index in np.flatnonzero(self._held_out == (split == "validation")):
            ids, _ = _sample(self.store, int(index))
            yield Document(self.store.names[index], self.store.domains[index], self.tokenizer.decode(ids))

    @cached_property
    def _held_out(self) -> Bool[np.ndarray, " D"]:
        """Which samples are held out: of few, at least one on each side."""
        held_out = self.store.held_out.copy()
        hashes = [name_hash(name) for name in self.store.names]
        held_out[int(np.argmin(hashes))] = True
        held_out[int(np.argmax(hashes))] = False
        return held_out

    @cached_property
    def _validation(self) -> tuple[np.ndarray, np.ndarray]:
        held_out, names = np.flatnonzero(self._held_out), self.store.names
        samples = np.array(sorted(held_out, key=lambda index: name_hash(names[index])), np.int64)
        space = self.config.sequence_length + 1
        packed = best_fit(self.store.lengths[samples].tolist(), space)
        count = min(len(packed), self.config.validation_sequences)
        chosen = [samples[packed[index * len(packed) // count]] for index in range(count)]
        rows = [join_samples([_sample(self.store, i) for i in row], space, self.tokenizer.pad_id) for row in chosen]
        tokens, segment_ids = zip(*rows, strict=True)
        return np.stack(tokens), np.stack(segment_ids)


@dataclasses.dataclass(frozen=True)
class ConversationRows:
    """The training rows of every epoch.

    Attributes:
      store: all samples, as in `ConversationData`.
      samples: indices of the training samples in the store.
      space: tokens of a row, T + 1.
      seed: random seed of the order of samples and rows.
      pad_id: fills up rows.
    """

    store: TokenStore
    samples: Int64[np.ndarray, " D"]
    space: int
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
        self._rows = [samples[row] for row in best_fit(source.store.lengths[samples].tolist(), source.space)]
        self.row_count = len(self._rows)
        self._order = np.random.default_rng([source.seed, number, _ROWS]).permutation(self.row_count)

    def row(self, index: int) -> Row:
        """Returns row `index` in the shuffled order: tokens and segment ids, int32 [T + 1] each."""
        source = self._source
        samples = [_sample(source.store, int(sample)) for sample in self._rows[int(self._order[index])]]
        return join_samples(samples, source.space, source.pad_id)


def _sample(store: TokenStore, index: int) -> SampleTokens:
    numbers = store.document(index).astype(np.int64)
    return numbers >> 1, (numbers & 1).astype(bool)
