"""One pass over the training documents: their order, their form, and the order of the rows packed from them.

All of it is a function of (seed, epoch): any row of any epoch can be read without reading those before it.
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
_ORDER, _FILL_IN_MIDDLE, _SPLITTING, _ROWS = range(4)  # streams of random numbers, independent of each other


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How documents become rows; the same for all epochs.

    Attributes:
      store, documents: the tokens, and the indices of the training documents among them.
      fill_in_middle, splitting: None where the rate is 0.
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


class Epoch:
    """The rows of one epoch, in their shuffled order."""

    def __init__(self, recipe: Recipe, epoch: int) -> None:
        self._recipe = recipe
        self._epoch = epoch
        count = len(recipe.documents)
        self._order = self._random(_ORDER).permutation(count)
        numbers = self._random(_FILL_IN_MIDDLE).random((count, 3))  # a row of three for each document
        wanted = recipe.fill_in_middle is not None
        self._rearranged = (numbers[:, 0] < recipe.fill_in_middle_rate) & wanted
        self._cuts = np.sort(numbers[:, 1:], axis=1)
        self._cache: dict[int, np.ndarray] = {}

        lengths = recipe.store.lengths[recipe.documents] + self._growth + 1
        for index in np.flatnonzero(self._rearranged).tolist():
            lengths[index] = len(self.document(index))
        self._borders = np.concatenate([[0], np.cumsum(lengths[self._order])])
        self.row_count = row_count(int(self._borders[-1]), recipe.sequence_length)

    def row(self, index: int) -> Row:
        """Row `index` in the shuffled order: int32 [T + 1] of tokens, and of segment ids."""
        place = int(self._row_order[index])
        recipe = self._recipe
        return pack_row(place, self._borders, self._read, recipe.sequence_length, recipe.pad_id)

    def document(self, index: int) -> np.ndarray:
        """Training document `index` as this epoch shows it, end of text included."""
        recipe = self._recipe
        ids = recipe.store.document(int(recipe.documents[index]))
        if recipe.splitting is not None:
            ids = recipe.splitting.split(ids, self._chosen(index))
        if self._rearranged[index]:
            assert recipe.fill_in_middle is not None
            ids = recipe.fill_in_middle.rearrange(ids, *self._cuts[index])
        return np.append(ids, recipe.eos_id).astype(np.int32)

    def _read(self, place: int, start: int, stop: int) -> np.ndarray:
        """Tokens of the document at `place` in this epoch's order."""
        recipe = self._recipe
        index = int(self._order[place])
        if recipe.splitting is None and not self._rearranged[index]:
            ids = recipe.store.document(int(recipe.documents[index]))[start:stop]
            return ids if len(ids) == stop - start else np.append(ids, recipe.eos_id)
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
        """Places in the store of the tokens to split, ascending, and how much each grows."""
        recipe = self._recipe
        assert recipe.splitting is not None
        growth = recipe.splitting.growth(recipe.store.tokens)
        places = np.flatnonzero(growth)
        places = places[self._random(_SPLITTING).random(len(places)) < recipe.splitting_rate]
        return places, growth[places]

    @property
    def _growth(self) -> Int64[np.ndarray, " D"]:
        """Tokens each training document gains by splitting, where it is not rearranged."""
        recipe = self._recipe
        if recipe.splitting is None:
            return np.zeros(len(recipe.documents), np.int64)
        places, growth = self._splits
        total = np.concatenate([[0], np.cumsum(growth)])
        bounds = total[np.searchsorted(places, recipe.store.borders)]
        return np.diff(bounds)[recipe.documents]

    def _chosen(self, index: int) -> Bool[np.ndarray, " n"]:
        """Which tokens of a training document are split."""
        recipe = self._recipe
        document = int(recipe.documents[index])
        start, stop = int(recipe.store.borders[document]), int(recipe.store.borders[document + 1])
        places, _ = self._splits
        first, last = np.searchsorted(places, [start, stop])
        chosen = np.zeros(stop - start, bool)
        chosen[places[first:last] - start] = True
        return chosen

    def _random(self, stream: int) -> np.random.Generator:
        return np.random.default_rng([self._recipe.seed, self._epoch, stream])
