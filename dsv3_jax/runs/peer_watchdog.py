"""Ends this process when the other processes of a run are lost, instead of waiting for them forever."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

PEERS_LOST = 4
"""Exit code of a process that has lost the others."""

_COMPILATION = 1800.0  # seconds added to the limit before the first step, which has to be compiled
_FAILURES = ("UNKNOWN", "INTERNAL", "UNAVAILABLE", "ABORTED", "CANCELLED", "DEADLINE_EXCEEDED", "FAILED_PRECONDITION")


class PeerWatchdog:
    """Ends this process when a collective operation fails, or when no step has ended for too long.

    A process that waits inside a collective cannot be interrupted by an exception, so a thread ends the whole process.
    With one process nothing is watched.

    Args:
      timeout: seconds that a step may take.
      how_to_resume: returns the end of the message that is printed: what the user can do.
    """

    def __init__(self, timeout: float, how_to_resume: Callable[[], str]):
        self._timeout, self._how_to_resume = timeout, how_to_resume
        self._deadline = time.monotonic() + timeout + _COMPILATION
        self._stepping = False
        self._ended = threading.Event()
        if jax.process_count() > 1:
            threading.Thread(target=self._watch, name="peer-watchdog", daemon=True).start()

    def progressed(self, *, by_a_step: bool = True) -> None:
        """Restarts the clock.

        Args:
          by_a_step: a training step has ended. Before the first one the limit is longer, because it is compiled.
        """
        self._stepping |= by_a_step
        if self._stepping:
            self._deadline = time.monotonic() + self._timeout

    def end(self) -> None:
        """Stops watching, when the other processes are no longer needed."""
        self._ended.set()

    def __enter__(self) -> PeerWatchdog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self.end()
        # A failed collective raises exceptions of different types, but their text always starts with a status name.
        if jax.process_count() > 1 and re.match(rf"({'|'.join(_FAILURES)}): ", str(error)):
            self._give_up(f"a collective failed ({(str(error).splitlines() or ['no reason'])[0][:160]})")

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self._timeout / 4)):
            if time.monotonic() > self._deadline:
                self._give_up(f"no step has ended for {self._timeout:g} s")

    def _give_up(self, reason: str) -> None:
        print(
            f"dsv3: process {jax.process_index()} of {jax.process_count()}: {reason}, so another process has died or "
            f"hangs. This process exits; {self._how_to_resume()}",
            file=sys.stderr,
            flush=True,
        )
        sys.stdout.flush()
        os._exit(PEERS_LOST)
