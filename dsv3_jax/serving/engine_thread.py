"""The thread that steps an engine. Other threads give it requests and get outputs by a function that it calls."""

from __future__ import annotations

import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from dsv3_jax.errors import UserError
from dsv3_jax.inference import Engine, Output, Request
from dsv3_jax.serving.metrics import Metrics

Receiver = Callable[[Output | None], None]
"""A function that is given each output of a request, and None if the engine has failed."""


class Overloaded(UserError):
    """The engine has as many requests as may wait; later there may be fewer."""


class EngineThread:
    """Steps an engine while it has work; `submit` and `cancel` may be called from any thread.

    Args:
      engine: the engine, which nothing else may use any more.
      max_waiting: most requests beyond those that the engine runs at a time.
      metrics: where the engine's state is recorded.

    Attributes:
      failed: whether the engine has raised an error, after which it serves nothing.
    """

    def __init__(self, engine: Engine, max_waiting: int, metrics: Metrics):
        self.failed = False
        self.capacity = engine.config.max_sequences + max_waiting
        self._engine, self._metrics = engine, metrics
        self._receivers: dict[int, Receiver] = {}
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        metrics.record_engine(engine)
        self._thread.start()

    def submit(self, requests: Sequence[Request], receivers: Sequence[Receiver]) -> Future[list[int]]:
        """Gives requests to the engine, all or none; the result has their numbers.

        The future raises UserError if the engine cannot serve one of them, and Overloaded if too many wait already.
        """
        future: Future[list[int]] = Future()

        def command() -> None:
            if not future.set_running_or_notify_cancel():
                return
            numbers: list[int] = []
            try:
                if self.failed or self._stopping:
                    raise Overloaded("the server is stopping" if self._stopping else "the engine has failed")
                if len(self._receivers) + len(requests) > self.capacity:
                    raise Overloaded("too many requests are waiting; try again later")
                for request in requests:
                    numbers.append(self._engine.submit(request))
            except UserError as error:
                for number in numbers:
                    self._engine.cancel(number)
                future.set_exception(error)
                return
            self._receivers |= zip(numbers, receivers, strict=True)
            future.set_result(numbers)

        self._call(command)
        return future

    def cancel(self, numbers: Sequence[int]) -> None:
        """Ends requests and frees their pages before the engine's next step; those that have ended are left alone."""

        def command() -> None:
            for number in numbers:
                if self._receivers.pop(number, None) is not None and not self.failed:
                    self._engine.cancel(number)

        self._call(command)

    def close(self) -> None:
        """Cancels what still runs and ends the thread."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    def _call(self, command: Callable[[], None]) -> None:
        with self._wake:
            if not self._thread.is_alive():
                command()  # which refuses requests
                return
            self._commands.append(command)
            self._wake.notify()

    def _run(self) -> None:
        try:
            while self._serve():
                pass
        except Exception:  # the engine's arrays may be lost, so it cannot go on
            print("dsv3: the engine has failed; requests are refused from now on", file=sys.stderr)
            traceback.print_exc()
            self.failed = True
            for receive in self._receivers.values():
                receive(None)
            self._receivers.clear()
        with self._wake:
            self._stopping = True
            commands = list(self._commands)
            self._commands.clear()
        for command in commands:
            command()

    def _serve(self) -> bool:
        """Carries out what was asked for and takes a step; returns whether to go on."""
        with self._wake:
            while not (self._commands or self._engine.has_work or self._stopping):
                self._metrics.record_engine(self._engine)
                self._wake.wait()
            commands = list(self._commands)
            self._commands.clear()
        for command in commands:
            command()
        if self._stopping:
            for number in list(self._receivers):
                self._engine.cancel(number)
            return False
        if self._engine.has_work:
            for output in self._engine.step():
                receive = self._receivers.get(output.request_id)
                if receive is None:
                    continue
                receive(output)
                if output.finished:
                    del self._receivers[output.request_id]
            self._metrics.record_engine(self._engine)
        return True
