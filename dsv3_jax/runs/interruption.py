"""Handling of Ctrl-C and SIGTERM: the run ends its step, saves a checkpoint and says how to resume.

The first signal only sets a flag, which the training loop reads between steps and between evaluation batches. (A
signal during compilation is noticed right after it.) A second signal ends the process at once.
"""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType


class Interruption:
    """A context manager that turns the first signal into a request to stop.

    Attributes:
      signal_number: the signal received, or None.
    """

    _SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Interruption:
        for number in self._SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)  # pyright: ignore[reportArgumentType]

    @property
    def requested(self) -> bool:
        """Whether a signal was received, so that the run should stop and save."""
        return self.signal_number is not None

    @property
    def exit_code(self) -> int:
        """128 plus the signal's number, as shells report it: 130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + (self.signal_number or 0)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            os._exit(128 + number)
        self.signal_number = number
