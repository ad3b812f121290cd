"""One pass over the training documents: their order, how they are changed, and the order of the rows packed from them.

Everything is a function of (seed, epoch), so any row of any epoch can be read without reading the rows before it.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Int64

from dsv3_jax.data.fill_in_middle import FillInMiddle
from dsv3_jax.data.packing import Row, pack_row, row_count
from dsv3_jax.data.punctuation_splitting import PunctuationSplitting
from dsv3_jax.data.token_store import TokenStore

_CACHED_DOCUMENTS = 32
_ORDER, _FILL_IN_MIDDLE, _SPLITTING, _ROWS = range(4)  # independent streams of random numbers


@dataclasses.dataclass(frozen=True)
class RowSettings:
    """The settings that decide how documents become rows, the same for all epochs.

    Attributes:
      store: the tokens of all documents.
      documents: indices of the training documents in the store.
      sequence_length: T; a row has T + 1 tokens.
      seed: random seed of everything an epoch draws.
      eos_id: end-of-text token, added to every document.
      pad_id: fills up the last row.
      fill_in_middle_rate: fraction of the documents that are rearranged.
      fill_in_middle: rearranges a document; None where the rate is 0.
      splitting_rate: fraction of the splittable tokens that are split.
      splitting: splits tokens; None where the rate is 0.
    """

    store: TokenStore
    documents: Int64[np.ndarray, " D"]
    sequence_length: int
    seed: int
    eos_id: int
    pad_id: int
    fill_in_middle_rate: float = 0.0
    fill_in_middle: FillInMiddle | None = None
    splitting_rate: float = 0.0
    splitting: PunctuationSplitting | None = None

    def epoch(self, number: int) -> Epoch:
        """Returns one pass over the documents."""
        return Epoch(self, number)


class Epoch:
    """The rows of one epoch, in shuffled order.

    Attributes:
      row_count: number of rows.
    """

    def __init__(self, settings: RowSettings, epoch: int) -> None:
        self._settings = settings
        self._epoch = epoch
        count = len(settings.documents)
        self._order = self._random(_ORDER).permutation(count)
        numbers = self._random(_FILL_IN_MIDDLE).random(
            (count, 3)
        )  # per document: whether to rearrange it, and two cuts
        wanted = settings.fill_in_middle is not None
        self._rearranged = (numbers[:, 0] < settings.fill_in_middle_rate) & wanted
        self._cuts = np.sort(numbers[:, 1:], axis=1)
        self._cache: dict[int, np.ndarray] = {}

        lengths = settings.store.lengths[settings.documents] + self._growth + 1
        for index in np.flatnonzero(self._rearranged).tolist():
            lengths[index] = len(self.document(index))
        self._borders = np.concatenate([[0], np.cumsum(lengths[self._order])])
        self.row_count = row_count(int(self._borders[-1]), settings.sequence_length)

    def row(self, index: int) -> Row:
        """Returns row `index` in the shuffled order: tokens and segment ids, int32 [T + 1] each."""
        position = int(self._row_order[index])
        settings = self._settings
        return pack_row(position, self._borders, self._read, settings.sequence_length, settings.pad_id)

    def document(self, index: int) -> np.ndarray:
        """Returns the tokens of training document `index` as this epoch changes them, with the end-of-text token."""
        settings = self._settings
        ids = settings.store.document(int(settings.documents[index]))
        if settings.splitting is not None:
            ids = settings.splitting.split(ids, self._chosen(index))
        if self._rearranged[index]:
            assert settings.fill_in_middle is not None
            ids = settings.fill_in_middle.rearrange(ids, *self._cuts[index])
        return np.append(ids, settings.eos_id).astype(np.int32)

    def _read(self, position: int, start: int, stop: int) -> np.ndarray:
        """Returns tokens `start` to `stop` of the document at `position` in this epoch's order."""
        settings = self._settings
        index = int(self._order[position])
        if settings.splitting is None and not self._rearranged[index]:
            ids = settings.store.document(int(settings.documents[index]))[start:stop]
            return ids if len(ids) == stop - start else np.append(ids, settings.eos_id)
        if index not in self._cache:
            if len(self._cache) == _CACHED_DOCUMENTS:
                self._cache.pop(next(iter(self._cache)))
            self._cache[index] = self.document(index)
        return self._cache[index][start:stop]

    @cached_property
    def _row_order(self) -> Int64[np.ndarray, " rows"]:
        return self._random(_ROWS).permutation(self.row_count)

    @cached_property
    def _splits(self) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        """Positions in the store of the tokens to split, ascending, and how many tokens each one gains."""
        settings = self._settings
        assert settings.splitting is not None
        growth = settings.splitting.growth(settings.store.tokens)
        positions = np.flatnonzero(growth)
        positions = positions[self._random(_SPLITTING).random(len(positions)) < settings.splitting_rate]
        return positions, growth[positions]

    @property
    def _growth(self) -> Int64[np.ndarray, " D"]:
        """Number of tokens that each training document gains by splitting, if it is not rearranged."""
        settings = self._settings
        if settings.splitting is None:
            return np.zeros(len(settings.documents), np.int64)
        positions, growth = self._splits
        total = np.concatenate([[0], np.cumsum(growth)])
        bounds = total[np.searchsorted(positions, settings.store.borders)]
        return np.diff(bounds)[settings.documents]

    def _chosen(self, index: int) -> Bool[np.ndarray, " n"]:
        """Returns which tokens of a training document are split."""
        settings = self._settings
        document = int(settings.documents[index])
        start, stop = int(settings.store.borders[document]), int(settings.store.borders[document + 1])
        positions, _ = self._splits
        first, last = np.searchsorted(positions, [start, stop])
        chosen = np.zeros(stop - start, bool)
        chosen[positions[first:last] - start] = True
        return chosen

    def _random(self, stream: int) -> np.random.Generator:
        return np.random.default_rng([self._settings.seed, self._epoch, stream])
