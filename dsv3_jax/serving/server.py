"""The server process: its socket, and its end when it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator

import uvicorn

from dsv3_jax.errors import UserError
from dsv3_jax.inference import Engine
from dsv3_jax.serving.app import make_app
from dsv3_jax.serving.engine_thread import EngineThread
from dsv3_jax.serving.metrics import Metrics
from dsv3_jax.serving.settings import ServedModel, ServerSettings

_POLL = 0.1  # seconds between two looks at whether to stop


def listen(host: str, port: int) -> socket.socket:
    """Returns a socket that listens; port 0 takes any that is free.

    Raises:
      UserError: the port is in use, or the address is not one of this machine.
    """
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind)
    except OSError as error:
        raise UserError(f"cannot listen on {host}: {error.strerror}; give an address of this machine") from error
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(address)
        listening.listen(1024)
    except OSError as error:
        listening.close()
        hint = "give another --port, or 0 for any that is free"
        raise UserError(f"cannot listen on port {port} of {host}: {error.strerror}; {hint}") from error
    listening.setblocking(False)
    return listening


class _Server(uvicorn.Server):
    """A server that leaves signals to its caller."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(
    engine: Engine,
    model: ServedModel,
    listening: socket.socket,
    settings: ServerSettings,
    *,
    stop: Callable[[], bool] = lambda: False,
    started: Callable[[], None] = lambda: None,
) -> None:
    """Serves requests until `stop` returns True; those that are running then are served to their end.

    Args:
      engine: the engine, which the server uses alone.
      model: the model as clients see it.
      listening: the socket, which is closed at the end.
      settings: limits.
      stop: asked ten times a second.
      started: called when requests are answered.
    """
    metrics = Metrics()
    thread = EngineThread(engine, settings.max_waiting, metrics)
    app = make_app(thread, model, settings, metrics, engine.context)
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="critical",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=round(settings.request_seconds) + 20,
    )
    server = _Server(config)

    async def run() -> None:
        serving = asyncio.create_task(server.serve([listening]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        started()
        while not serving.done():
            if stop():
                server.should_exit = True
            await asyncio.sleep(_POLL)
        await serving

    try:
        asyncio.run(run())
    finally:
        thread.close()
        listening.close()
