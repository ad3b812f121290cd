"""Rows read ahead in other processes that neither outlive the run nor end before it.

A signal meant for the run (Ctrl-C, a scheduler's SIGTERM) reaches every process of it. The training process answers by
saving, for which it may need more rows, so the workers pay no attention; they end when it closes them or dies.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading

import grain
from absl import flags

_ROWS_AHEAD = 16  # of each worker
_LARGEST_COPIED = (
    2**20
)  # bytes; smaller arrays cross through a pipe, which leaves nothing behind when a process is killed


def read_ahead(rows: grain.IterDataset, worker_count: int) -> grain.IterDataset:
    """The same rows in the same order, prepared by `worker_count` processes."""
    if not flags.FLAGS.is_parsed():  # grain reads absl's flags, which only an absl program has parsed
        flags.FLAGS.mark_as_parsed()
    options = grain.experimental.DatasetOptions(min_shm_size=_LARGEST_COPIED)
    return grain.experimental.WithOptionsIterDataset(rows, options).mp_prefetch(
        grain.MultiprocessingOptions(num_workers=worker_count, per_worker_buffer_size=_ROWS_AHEAD),
        worker_init_fn=_live_as_long_as_the_parent,
    )


def is_death_of_worker(error: RuntimeError) -> bool:
    """Whether grain reports a process that ended by itself: killed, or out of memory."""
    return str(error).startswith("Worker process was terminated")


def _live_as_long_as_the_parent(index: int, count: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
