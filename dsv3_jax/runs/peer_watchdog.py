"""Ends this process when the other processes of a run are lost, instead of waiting for them forever."""

from __future__ import annotations

import re
import threading
import time
from typing import Any

from dsv3_jax.errors import reason_of
from dsv3_jax.runs.peers import PEERS_LOST, Peers

_COMPILATION = 1800.0  # seconds added to the limit before the first step, which has to be compiled
_SLOWER = 1.0  # seconds, after which `Peers` has said which process was lost
_FAILURES = ("UNKNOWN", "INTERNAL", "UNAVAILABLE", "ABORTED", "CANCELLED", "DEADLINE_EXCEEDED", "FAILED_PRECONDITION")


class PeerWatchdog:
    """Ends this process when a collective operation fails, or when no step has ended for too long.

    A process that waits inside a collective cannot be interrupted by an exception, so a thread ends the whole process.

    Args:
      peers: the other processes; None where there are none, and nothing is watched.
    """

    def __init__(self, peers: Peers | None):
        self._peers = peers
        self._stepping = False
        self._ended = threading.Event()
        if peers is not None:
            self._deadline = time.monotonic() + peers.timeout + _COMPILATION
            threading.Thread(target=self._watch, args=(peers,), name="peer-watchdog", daemon=True).start()

    def progressed(self, *, by_a_step: bool = True) -> None:
        """Restarts the clock.

        Args:
          by_a_step: a training step has ended. Before the first one the limit is longer, because it is compiled.
        """
        self._stepping |= by_a_step
        if self._stepping and self._peers is not None:
            self._deadline = time.monotonic() + self._peers.timeout

    def end(self) -> None:
        """Stops watching, when the other processes are no longer needed."""
        self._ended.set()

    def __enter__(self) -> PeerWatchdog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self.end()
        # A failed collective raises exceptions of different types, but their text always starts with a status name.
        if self._peers is not None and re.match(rf"({'|'.join(_FAILURES)}): ", str(error)):
            time.sleep(_SLOWER)
            self._peers.lose(PEERS_LOST, f"a collective failed ({reason_of(error)[:160]})" if error else "")

    def _watch(self, peers: Peers) -> None:
        while not self._ended.wait(min(1.0, peers.timeout / 4)):
            if time.monotonic() > self._deadline:
                peers.lose(
                    PEERS_LOST, f"no step has ended for {peers.timeout:g} s, so another process has died or hangs"
                )
