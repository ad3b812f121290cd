"""Mixtures of corpora: `mix:0.7*stdlib+0.3*/data/texts`.

Of every 1,000 rows each corpus gives its share, in an order drawn from the seed. So row i of a run can be found without
reading the rows before it: it is row k of one corpus, which has epochs of its own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from dsv3_jax.data.document_files import Document
from dsv3_jax.data.packing import Row
from dsv3_jax.data.prepared import Data
from dsv3_jax.data.train_iterator import ENDLESS, EndlessRows, TrainIterator
from dsv3_jax.errors import ConfigError

MIXTURE = "mix:"
_BLOCK = 1000  # rows in which every corpus has exactly its share
_ORDER = 4  # a stream of random numbers apart from those of epochs


def parse_mixture(text: str) -> list[tuple[str, int]]:
    """Returns each corpus of a mixture and its number of every 1,000 rows.

    Args:
      text: `mix:` and the corpora, joined by +, each after its weight and *. Weights are relative to their sum.

    Raises:
      ConfigError: the text is not of this form, or a corpus would get less than one row of 1,000.
    """
    parts = re.split(r"\s*\+\s*(?=[0-9.]+\*)", text.removeprefix(MIXTURE))
    found = [re.fullmatch(r"([0-9]*\.?[0-9]+)\*(.+)", part.strip()) for part in parts]
    if not all(found) or len(found) < 2:
        raise ConfigError(f"data.corpus {text!r:.200} must have the form mix:0.7*stdlib+0.3*/data/texts")
    names = [match[2] for match in found if match]
    weights = np.array([float(match[1]) for match in found if match])
    if len(set(names)) < len(names):
        raise ConfigError(f"data.corpus {text!r:.200} names a corpus twice")
    shares = weights / max(weights.sum(), 1e-300) * _BLOCK
    counts = np.floor(shares).astype(int)
    if not counts.all():
        raise ConfigError(f"data.corpus: {names[int(np.argmin(counts))]} has a weight below 1 in {_BLOCK:,} rows")
    for index in np.argsort(counts - shares, kind="stable")[: _BLOCK - counts.sum()]:
        counts[index] += 1
    return list(zip(names, counts.tolist(), strict=True))


class MixedRows:
    """The rows of a mixture, in order, as a source for `grain.MapDataset`.

    Args:
      sources: the rows of each corpus.
      counts: rows of each corpus among every 1,000.
      seed: random seed of the order.
    """

    def __init__(self, sources: Sequence[EndlessRows], counts: Sequence[int], seed: int) -> None:
        self._sources, self._counts, self._seed = list(sources), list(counts), seed
        self._order = lru_cache(maxsize=4)(self._order_of)

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> Row:
        source, row = self.locate(index)
        return self._sources[source][row]

    def locate(self, index: int) -> tuple[int, int]:
        """Returns the corpus of row `index` of the run, and the number of the row within that corpus."""
        block, place = divmod(index, _BLOCK)
        order = self._order(block)
        source = int(order[place])
        return source, block * self._counts[source] + int((order[:place] == source).sum())

    def _order_of(self, block: int) -> np.ndarray:
        return np.random.default_rng([self._seed, block, _ORDER]).permutation(
            np.repeat(np.arange(len(self._counts)), self._counts)
        )

    def __getstate__(self) -> dict[str, Any]:
        return {"sources": self._sources, "counts": self._counts, "seed": self._seed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)


@dataclasses.dataclass(frozen=True, eq=False)
class MixedData(Data):
    """A prepared mixture. Its validation rows are those of its corpora, as many of each as its share.

    Attributes:
      parts: the prepared corpora. All have the same tokenizer.
      counts: rows of each corpus among every 1,000.
    """

    parts: tuple[Data, ...] = ()
    counts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Does nothing: each part has checked itself."""

    @classmethod
    def of(cls, whole: Data, parts: Sequence[Data], counts: Sequence[int]) -> MixedData:
        """Returns the mixture of prepared corpora.

        Args:
          whole: the first of the parts with the mixture's own configuration.
        """
        digest = hashlib.sha256()
        for part, count in zip(parts, counts, strict=True):
            digest.update(f"{part.corpus_fingerprint} {count}\n".encode())
        return cls(
            config=whole.config,
            tokenizer=whole.tokenizer,
            store=whole.store,
            corpus_fingerprint=digest.hexdigest(),
            shard_index=whole.shard_index,
            shard_count=whole.shard_count,
            parts=tuple(parts),
            counts=tuple(counts),
        )

    @property
    def num_train_tokens(self) -> int:
        """Number of tokens of the training documents of all corpora."""
        return sum(part.num_train_tokens for part in self.parts)

    def readings(self, tokens: int) -> dict[str, float]:
        """Returns how often each corpus is read by a run of so many tokens, by its name."""
        shares = [count / _BLOCK for count in self.counts]
        return {
            part.config.corpus: tokens * share / part.num_train_tokens
            for part, share in zip(self.parts, shares, strict=True)
        }

    def train_iterator(self) -> TrainIterator:
        """Returns an iterator over this shard's rows, at the start."""
        rows = MixedRows([EndlessRows(part.row_source) for part in self.parts], self.counts, self.config.seed)
        return TrainIterator(rows, self.fingerprint, self.shard_index, self.shard_count, self.config.worker_count)

    def documents(self, split: str = "train") -> Iterator[Document]:
        """Yields the documents of `split` of every corpus."""
        return itertools.chain.from_iterable(part.documents(split) for part in self.parts)

    @cached_property
    def _validation(self) -> tuple[np.ndarray, np.ndarray]:
        parts = [dataclasses.replace(part, begins_rows=self.begins_rows).validation_rows() for part in self.parts]
        tokens, segments = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return tokens, segments
