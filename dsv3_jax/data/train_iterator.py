"""An endless iterator over training rows: each row exactly once per epoch, resumable at any row.

Grain reads single rows of an endless source, sliced over the shards and then over the worker processes of a shard. Rows
are batched afterwards. So neither the number of workers nor the batch size changes the rows, and the state is one
number: how many rows all shards together have taken.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from jaxtyping import Int32

from dsv3_jax.data.packing import Row
from dsv3_jax.data.worker_processes import is_death_of_worker, read_ahead
from dsv3_jax.errors import UserError

if TYPE_CHECKING:
    import grain

ENDLESS = 2**62
_ATTEMPTS = 3  # at reading a batch, each with new worker processes


class Rows(Protocol):
    """The rows of a run in order, by their number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row:
        """Returns row `index` of the run: tokens and segment ids, int32 [T + 1] each."""
        ...


class EpochOfRows(Protocol):
    """One pass over the training data, in shuffled order.

    Attributes:
      row_count: number of rows.
    """

    row_count: int

    def row(self, index: int) -> Row:
        """Returns row `index`: tokens and segment ids, int32 [T + 1] each."""
        ...


class RowSource(Protocol):
    """The training rows of every epoch, which can be pickled for worker processes."""

    def epoch(self, number: int) -> EpochOfRows:
        """Returns the rows of one epoch."""
        ...


class EndlessRows:
    """The rows of all epochs, one epoch after another, as a source for `grain.MapDataset`."""

    def __init__(self, source: RowSource) -> None:
        self._source = source
        self._starts = [0]  # number of the first row of each epoch; one entry more than the epochs counted
        self._epochs: dict[int, EpochOfRows] = {}

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> Row:
        epoch, row = self.locate(index)
        return self._epoch(epoch).row(row)

    def locate(self, index: int) -> tuple[int, int]:
        """Returns the epoch of row `index` of the run, and its number within that epoch."""
        while self._starts[-1] <= index:
            self.start_of(len(self._starts))
        epoch = int(np.searchsorted(self._starts, index, side="right")) - 1
        return epoch, index - self._starts[epoch]

    def start_of(self, epoch: int) -> int:
        """Returns the number of the first row of an epoch."""
        while len(self._starts) <= epoch:
            self._starts.append(self._starts[-1] + self._epoch(len(self._starts) - 1).row_count)
        return self._starts[epoch]

    def _epoch(self, number: int) -> EpochOfRows:
        if number not in self._epochs:
            while len(self._epochs) > 1:  # two are kept: near the end of an epoch, rows of both are read
                self._epochs.pop(min(self._epochs))
            self._epochs[number] = self._source.epoch(number)
        return self._epochs[number]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_epochs": {}}


class TrainIterator:
    """The training rows of one shard. `Data.train_iterator` makes it."""

    def __init__(
        self,
        source: Rows,
        fingerprint: Mapping[str, str],
        shard_index: int,
        shard_count: int,
        worker_count: int,
    ) -> None:
        if not 0 <= shard_index < shard_count:
            raise ValueError(f"shard_index ({shard_index}) must be at least 0 and below shard_count ({shard_count})")
        self._source = source
        self._fingerprint = dict(fingerprint)
        self._shard_index, self._shard_count = shard_index, shard_count
        self._worker_count = worker_count
        self._rows_taken = 0  # by all shards together
        self._rows: list[grain.DatasetIterator[Row]] = []  # one iterator when open
        # Also closes when the program ends without `close`: grain fails if the interpreter closes it at exit.
        weakref.finalize(self, _close_all, self._rows)

    def next_rows(self, count: int) -> tuple[Int32[np.ndarray, "count T_plus_1"], Int32[np.ndarray, "count T_plus_1"]]:
        """Returns tokens and segment ids of the next `count` rows of this shard, int32.

        All shards must ask for the same number.

        Raises:
          UserError: worker processes died several times in a row.
        """
        rows = self._read(count)
        self._rows_taken += count * self._shard_count
        tokens, segment_ids = zip(*rows, strict=True)
        return np.stack(tokens), np.stack(segment_ids)

    def state(self) -> dict[str, Any]:
        """Returns the iterator's position for `set_state`. It can be stored as JSON and is the same on every shard."""
        return {"rows_taken": self._rows_taken, "fingerprint": dict(self._fingerprint)}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Moves to the position of `state`. The number of shards, workers and rows per batch may have changed.

        Raises:
          UserError: the state belongs to other data (the message names what changed), or is damaged.
        """
        try:
            taken, then = state["rows_taken"], dict(state["fingerprint"])
        except (KeyError, TypeError, ValueError):
            raise UserError(
                "the saved state of the data iterator is damaged: it lacks rows_taken or fingerprint"
            ) from None
        if not isinstance(taken, int) or isinstance(taken, bool) or not 0 <= taken < ENDLESS:
            raise UserError(f"the saved state of the data iterator is damaged: rows_taken is {taken!r}")
        now = self._fingerprint
        changed = [key for key in sorted({*then, *now}) if then.get(key) != now.get(key)]
        if changed:
            details = ", ".join(_describe_change(key, then.get(key), now.get(key)) for key in changed)
            raise UserError(f"the data changed since the state was saved: {details}; restore it, or start a new run")
        self.close()
        self._rows_taken = taken

    def close(self) -> None:
        """Ends the worker processes. Reading more rows starts them again."""
        _close_all(self._rows)

    def _read(self, count: int) -> list[Row]:
        for _ in range(_ATTEMPTS):
            if not self._rows:
                self._rows.append(self._open())
            try:
                return [next(self._rows[0]) for _ in range(count)]
            except RuntimeError as error:
                if not is_death_of_worker(error):
                    raise
                self.close()  # the batch is read again from its first row
        raise UserError(
            f"worker processes of the data were killed or ran out of memory {_ATTEMPTS} times in a row: give a "
            f"data.worker_count below {self._worker_count}, or 0 to prepare rows in the training process"
        )

    def _open(self) -> grain.DatasetIterator[Row]:
        """Opens grain's iterator over this shard's rows, from the current position."""
        import grain  # only here, since a machine that trains on other data may lack it

        start = self._rows_taken + self._shard_index
        shard = grain.MapDataset.source(self._source)[start :: self._shard_count]
        rows = shard.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
        if self._worker_count:
            rows = read_ahead(rows, self._worker_count)
        return iter(rows)


def _close_all(opened: list[grain.DatasetIterator[Row]]) -> None:
    while opened:
        opened.pop().close()


def _describe_change(key: str, then: str | None, now: str | None) -> str:
    name = f"data.{key}"
    short = all(value is None or len(value) < 40 for value in (then, now))
    return f"{name} was {then}, is {now}" if short else f"{name} differs"
