"""Rows in shuffled order, for ever, from an exact place: grain does the reading.

The order is a function of the seed and the epoch alone. Batches are cut from the stream of rows afterwards, so that
batch size, worker count and restarts never change which rows come, in which order, or how often.
"""

from __future__ import annotations

from typing import Any

import grain
import numpy as np
from absl import flags

from dsv3_jax.data.packing import PackedRows
from dsv3_jax.errors import UserError


class TrainIterator:
    """Training rows of one host.

    Args:
      rows: the source.
      seed: of the shuffle.
      shard_index, shard_count: this host's share: every shard_count-th row of the common order.
      worker_count: reading processes; 0 reads here.
      fingerprint: what the rows depend on; a state from other rows is refused.
    """

    def __init__(
        self,
        rows: PackedRows,
        *,
        seed: int,
        shard_index: int = 0,
        shard_count: int = 1,
        worker_count: int = 0,
        fingerprint: dict[str, str],
    ):
        if not 0 <= shard_index < shard_count:
            raise ValueError(f"shard_index must lie between 0 and {shard_count - 1}, not {shard_index}")
        self._fingerprint = fingerprint | {"shards": f"{shard_index} of {shard_count}"}
        order = grain.MapDataset.source(rows).seed(seed).shuffle().repeat()  # pyright: ignore[reportArgumentType]
        self._order = order[shard_index::shard_count]
        self._worker_count = worker_count
        self._taken = 0
        self._reader = self._read_from(0)

    def next_rows(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The next rows: tokens and segment ids, int32 [count, T+1] each."""
        rows = [next(self._reader) for _ in range(count)]
        self._taken += count
        return np.stack([tokens for tokens, _ in rows]), np.stack([segments for _, segments in rows])

    def state(self) -> dict[str, Any]:
        """Where the iterator stands, for JSON."""
        return {"rows_taken": self._taken, "fingerprint": self._fingerprint}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a place that `state` recorded.

        Raises:
          UserError: the state is of other data; names what changed.
        """
        for name, value in self._fingerprint.items():
            before = state["fingerprint"].get(name)
            if before != value:
                raise UserError(
                    f"the run cannot go on with other data: {name} was {before}, now {value}; give what it was, "
                    "or start anew with another --out"
                )
        self._taken = int(state["rows_taken"])
        self._reader = self._read_from(self._taken)

    def _read_from(self, place: int) -> grain.DatasetIterator:
        rest = self._order[place:]
        dataset = rest.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=16))
        if self._worker_count:
            if (
                not flags.FLAGS.is_parsed()
            ):  # worker processes are given absl's flags, which a plain script never parses
                flags.FLAGS.mark_as_parsed()
            dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=self._worker_count))
        return iter(dataset)
