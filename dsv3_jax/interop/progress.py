"""Shows a progress bar in bytes on stderr."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


@contextmanager
def byte_progress(what: str, total: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """Yields a function that moves the progress bar by a number of bytes and may be called from any thread.

    Args:
      what: the text beside the bar.
      total: bytes in all.
      shown: if False, no bar is drawn.
    """
    if not shown:
        yield lambda count: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    lock = threading.Lock()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)

        def advance(count: int) -> None:
            with lock:
                bar.advance(task, count)

        yield advance
