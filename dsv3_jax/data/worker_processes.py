"""Worker processes that prepare rows ahead of time, and end when the training process ends, not earlier.

A signal meant for the run (Ctrl-C, a scheduler's SIGTERM) reaches all its processes. The training process may need more
rows before it stops, so the workers ignore the signal. They end when the training process closes them or dies.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import grain

_ROWS_AHEAD = 16  # per worker
# Smaller arrays (in bytes) are sent through a pipe, which leaves no shared memory behind when a process is killed.
_LARGEST_COPIED = 2**20


def read_ahead(rows: grain.IterDataset, worker_count: int) -> grain.IterDataset:
    """Returns the same rows in the same order, prepared by `worker_count` processes."""
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():  # grain reads absl's flags, which only programs that use absl have parsed
        flags.FLAGS.mark_as_parsed()
    options = grain.experimental.DatasetOptions(min_shm_size=_LARGEST_COPIED)
    return grain.experimental.WithOptionsIterDataset(rows, options).mp_prefetch(
        grain.MultiprocessingOptions(num_workers=worker_count, per_worker_buffer_size=_ROWS_AHEAD),
        worker_init_fn=live_as_long_as_parent,
    )


def is_death_of_worker(error: RuntimeError) -> bool:
    """Returns whether grain reports that a worker process was killed or ran out of memory."""
    return str(error).startswith("Worker process was terminated")


def live_as_long_as_parent(index: int, count: int) -> None:
    """Makes this worker process ignore signals to stop, and end when its parent process has ended."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
