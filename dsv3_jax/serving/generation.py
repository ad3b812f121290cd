"""One HTTP request on its way through the engine: outputs as they come, a time-out, and clients that leave."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator
from concurrent.futures import Future

from starlette.types import Receive

from dsv3_jax.errors import UserError
from dsv3_jax.inference import Output, Request
from dsv3_jax.serving.engine_thread import EngineThread, Overloaded
from dsv3_jax.serving.errors import ApiError
from dsv3_jax.serving.metrics import Metrics


class ClientLeft(Exception):
    """The client has closed the connection."""


class Generation:
    """The completions of one HTTP request. Leaving its context frees what they still hold.

    Args:
      engine: where they run.
      metrics: where times and ends are counted.
      seconds: longest time for all of them.
    """

    def __init__(self, engine: EngineThread, metrics: Metrics, seconds: float):
        self._engine, self._metrics, self._seconds = engine, metrics, seconds
        self._began = time.monotonic()
        self._news: asyncio.Queue[tuple[int, Output | None] | ClientLeft] = asyncio.Queue()
        self._numbers: list[int] = []
        self._watch: asyncio.Task[None] | None = None
        self._end = "error"

    async def start(self, requests: tuple[Request, ...], receive: Receive) -> None:
        """Gives the requests to the engine.

        Args:
          receive: the connection's events, of which the next is that the client leaves.

        Raises:
          ApiError: the engine cannot serve them, or not now.
        """
        loop = asyncio.get_running_loop()

        def put(number: int, output: Output | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server was stopped by force
                loop.call_soon_threadsafe(self._news.put_nowait, (number, output))

        receivers = [functools.partial(put, number) for number in range(len(requests))]
        future = self._engine.submit(requests, receivers)
        try:
            self._numbers = await asyncio.wrap_future(future)
        except Overloaded as error:
            raise ApiError(str(error), status=503, code="overloaded") from error
        except UserError as error:
            raise ApiError(str(error)) from error
        except asyncio.CancelledError:
            future.add_done_callback(self._cancel_late)
            raise
        self._watch = asyncio.create_task(self._watch_client(receive))

    async def outputs(self) -> AsyncIterator[tuple[int, Output]]:
        """Yields the number of a completion and what the engine added to it, until all have ended.

        Raises:
          ApiError: the time is over, or the engine has failed.
          ClientLeft: nobody waits for the answer any more.
        """
        unfinished = len(self._numbers)
        first = True
        deadline = asyncio.get_running_loop().time() + self._seconds - (time.monotonic() - self._began)
        while unfinished:
            try:
                async with asyncio.timeout_at(deadline):
                    news = await self._news.get()
            except TimeoutError:
                self._end = "timeout"
                raise ApiError(f"the request took more than {self._seconds:g} s", status=504, code="timeout") from None
            if isinstance(news, ClientLeft):
                self._end = "disconnected"
                raise news
            number, output = news
            if output is None:
                raise ApiError("the engine has failed", status=500, code="engine_failed")
            if first and output.tokens:
                self._metrics.record_first_token(time.monotonic() - self._began)
                first = False
            if output.finished:
                unfinished -= 1
                self._end = output.finished
            yield number, output

    def close(self) -> None:
        """Frees what the completions still hold."""
        if self._watch is not None:
            self._watch.cancel()
        if self._numbers:
            self._engine.cancel(self._numbers)
        self._metrics.record_end(self._end, time.monotonic() - self._began)

    def _cancel_late(self, future: Future[list[int]]) -> None:
        if not future.cancelled() and future.exception() is None:
            self._engine.cancel(future.result())

    async def _watch_client(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._news.put_nowait(ClientLeft())
