"""Handling of Ctrl-C, SIGTERM and the signals by which a cluster announces the end of a job.

The first signal asks the program to stop, the second one ends it at once. Python runs a signal's handler only between
two of its own instructions, so compiling or tokenising would delay it and two signals would count as one. Therefore a
thread reads every signal from a pipe, which the operating system's handler writes to.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType

from dsv3_jax.operating_system import NOTICES, Notice, nonblocking_pipe

_GRACE = 2.0  # seconds for the main thread to end by itself, where nothing would be lost


class Interrupted(KeyboardInterrupt):
    """The program was told to stop while there was nothing to save.

    Attributes:
      exit_code: 128 plus the signal's number.
    """

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class Interruption:
    """A context manager that answers the first signal, and ends the process at the second.

    The answer to the first depends on `defer`. While it is False, Interrupted is raised in the main thread. While it
    is True, the program asks for `requested` from time to time. Where nothing is unsaved and the main thread has done
    neither after two seconds, as while it compiles, the process ends. Native code may turn Interrupted into another
    exception, as Python does where an extension module is imported; it leaves the block as Interrupted all the same.

    Args:
      last_words: returns the line that is printed before the process ends without the main thread.
      notice: the signal that is answered beside SIGINT and SIGTERM: "USR1" or "USR2". The other one of these is
        ignored; with "none", both are.

    Attributes:
      signal_number: the signal received, or None.
      defer: whether the program asks for `requested`.
      unsaved: whether work would be lost if the process ended.
    """

    def __init__(self, last_words: Callable[[], str] = lambda: "", notice: Notice = "USR1") -> None:
        self.signal_number: int | None = None
        self._raised: Interrupted | None = None
        self.defer = False
        self.unsaved = False
        self._signals = [signal.SIGTERM, signal.SIGINT, *(n for name, n in NOTICES.items() if name == notice)]
        self._ignored = [number for name, number in NOTICES.items() if name != notice]
        self._last_words = last_words
        self._answered = threading.Event()
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is not threading.main_thread():
            return self  # signals are for the main thread, which may have other plans
        self._read, self._write = nonblocking_pipe()
        for number in self._signals:
            self._previous[number] = signal.signal(number, self._handle)
        for number in self._ignored:
            self._previous[number] = signal.signal(number, signal.SIG_IGN)
        self._previous_hook, sys.unraisablehook = sys.unraisablehook, self._raised_in_vain
        self._previous_pipe = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._watcher = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._previous:
            return
        self._answered.set()
        for number, previous in self._previous.items():
            signal.signal(number, previous)  # pyright: ignore[reportArgumentType]
        signal.set_wakeup_fd(self._previous_pipe)
        sys.unraisablehook = self._previous_hook
        os.close(self._write)
        self._watcher.join()
        os.close(self._read)
        if self._raised is not None and isinstance(error, Exception):
            raise self._raised from error

    @property
    def requested(self) -> bool:
        """Whether a signal was received, so that the program should stop. The main thread asks."""
        if self.signal_number is None:
            return False
        self._answered.set()
        return True

    @property
    def exit_code(self) -> int:
        """128 plus the signal's number, as shells report it: 130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + (self.signal_number or 0)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal_number = self.signal_number or number
        if not self.defer and not self._answered.is_set():
            self._answered.set()
            self._raised = Interrupted(number)
            raise self._raised

    def _raised_in_vain(self, ignored: sys.UnraisableHookArgs) -> None:
        """Ends the process where Python ignored the exception: it was raised in a destructor or a garbage callback."""
        if not isinstance(ignored.exc_value, Interrupted):
            self._previous_hook(ignored)
        elif not self.unsaved:  # else the program asks for `requested`
            self._end(self.exit_code)

    def _watch(self) -> None:
        """Reads signals until the pipe is closed."""
        received = 0
        while True:
            waiting = None if not received or self._answered.is_set() or self.unsaved else _GRACE
            if not select.select([self._read], [], [], waiting)[0]:
                if not self._answered.is_set() and not self.unsaved:
                    self._end(self.exit_code)
                continue
            numbers = os.read(self._read, 64)
            if not numbers:
                return
            for number in numbers:
                if number not in self._signals:
                    continue
                received += 1
                self.signal_number = self.signal_number or number
                if received > 1:
                    os._exit(128 + number)

    def _end(self, exit_code: int) -> None:
        if words := self._last_words():
            print(words, file=sys.stderr, flush=True)
        os._exit(exit_code)
