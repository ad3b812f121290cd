"""The routes of the server, as an ASGI application."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import sys
import traceback
from collections.abc import Callable
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from dsv3_jax.inference import Result
from dsv3_jax.serving.answers import Answer
from dsv3_jax.serving.bodies import Asked, read_chat, read_completion
from dsv3_jax.serving.engine_thread import EngineThread
from dsv3_jax.serving.errors import ApiError
from dsv3_jax.serving.generation import ClientLeft, Generation
from dsv3_jax.serving.metrics import Metrics
from dsv3_jax.serving.settings import ServedModel, ServerSettings

_OPEN = ("/health", "/")  # paths that need no key
_PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"
)
_LOCAL = ("localhost", "127.0.0.1", "[::1]")
_SEND_GRACE = 10.0  # seconds for a client to take the end of an answer


def make_app(
    engine: EngineThread, model: ServedModel, settings: ServerSettings, metrics: Metrics, context: int
) -> ASGIApp:
    """Returns the application.

    Args:
      context: most tokens of a request, prompt included.
    """
    page = (resources.files("dsv3_jax.serving") / "page.html").read_text(encoding="utf-8")

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_described(model, context)]})

    async def one_model(request: Request) -> Response:
        if request.path_params["name"] != model.name:
            raise ApiError("this model does not exist", status=404, param="model", code="model_not_found")
        return JSONResponse(_described(model, context))

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "failed" if engine.failed else "ok"}, 503 if engine.failed else 200)

    async def measured(request: Request) -> Response:
        return PlainTextResponse(metrics.text(), media_type="text/plain; version=0.0.4")

    async def chat_page(request: Request) -> Response:
        return HTMLResponse(page, headers={"content-security-policy": _PAGE_POLICY, "x-frame-options": "DENY"})

    def endpoint(read: Callable[[bytes, ServedModel, int], Asked]) -> Callable[[Request], Any]:
        async def serve(request: Request) -> Any:
            body = await _body(request, settings)
            asked = await run_in_threadpool(read, body, model, context)
            return _Answering(asked, Answer(asked, model), engine, metrics, settings.request_seconds)

        return serve

    routes = [
        Route("/", chat_page),
        Route("/health", health),
        Route("/metrics", measured),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", one_model),
        Route("/v1/completions", endpoint(read_completion), methods=["POST"]),
        Route("/v1/chat/completions", endpoint(read_chat), methods=["POST"]),
    ]
    app = Starlette(
        routes=routes, exception_handlers={ApiError: _api_error, HTTPException: _http_error, ClientDisconnect: _nothing}
    )
    return _guarded(app, settings)


class _Answering:
    """A response that runs the completions while it is sent."""

    def __init__(self, asked: Asked, answer: Answer, engine: EngineThread, metrics: Metrics, seconds: float):
        self._asked, self._answer = asked, answer
        self._seconds = seconds
        self._generation = Generation(engine, metrics, seconds)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        generation = self._generation
        with contextlib.closing(generation), contextlib.suppress(ClientLeft):
            try:
                await generation.start(self._asked.requests, receive)
                if not self._asked.stream:
                    results = [Result() for _ in self._asked.requests]
                    async for number, output in generation.outputs():
                        results[number].add(output)
                    response = JSONResponse(self._answer.whole(results))
            except ApiError as error:
                response = _json(error)
            else:
                if self._asked.stream:
                    # A client that does not read fills the connection, and sending waits for it.
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(self._seconds + _SEND_GRACE):
                            await self._stream(send)
                    return
            await response(scope, receive, send)

    async def _stream(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def event(value: Any) -> None:
            data = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})

        try:
            for chunk in self._answer.first():
                await event(chunk)
            async for number, output in self._generation.outputs():
                await event(self._answer.piece(number, output))
            for chunk in self._answer.last():
                await event(chunk)
        except ApiError as error:
            await event(error.body())
        await event("[DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _body(request: Request, settings: ServerSettings) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # A web page of another site can send other types without asking the browser's permission.
        raise ApiError("the content type must be application/json", status=415)
    parts, size = [], 0
    try:
        async with asyncio.timeout(settings.body_seconds):
            async for part in request.stream():
                size += len(part)
                if size > settings.body_bytes:
                    raise ApiError(f"the body is larger than {settings.body_bytes:,} bytes", status=413)
                parts.append(part)
    except TimeoutError:
        raise ApiError(f"the body has not come within {settings.body_seconds:g} s", status=408) from None
    return b"".join(parts)


def _guarded(app: ASGIApp, settings: ServerSettings) -> ASGIApp:
    """Returns the application behind the checks of host and key. A bug of ours becomes a traceback and code 500."""

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await app(scope, receive, send)
        started = False

        async def watched(message: Any) -> None:
            nonlocal started
            started = True
            await send(message)

        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1").rsplit(":", 1)[0] if b"host" in headers else ""
        error = None
        if settings.local_only and host not in _LOCAL:
            error = ApiError("this server answers only to localhost and 127.0.0.1", status=403)
        elif settings.api_key is not None and scope["path"] not in _OPEN:
            given = headers.get(b"authorization", b"").removeprefix(b"Bearer ").strip()
            if not hmac.compare_digest(given, settings.api_key.encode()):
                error = ApiError("the API key is missing or wrong", status=401, code="invalid_api_key")
        if error is not None:
            return await _json(error)(scope, receive, watched)
        try:
            await app(scope, receive, watched)
        except Exception:
            traceback.print_exc(file=sys.stderr)
            if not started:
                await _json(ApiError("the server has failed on this request", status=500))(scope, receive, send)

    return guarded


def _described(model: ServedModel, context: int) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "dsv3-jax",
        "description": model.note,
        "max_model_len": context,
        "has_chat_template": model.template is not None,
    }


def _json(error: ApiError) -> JSONResponse:
    headers = {"connection": "close"} if error.status in (408, 413) else {}
    headers |= {"retry-after": "1"} if error.status == 503 else {}
    return JSONResponse(error.body(), error.status, headers=headers)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _json(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    reasons = {404: f"there is no {request.url.path:.200}", 405: f"{request.method} is not for {request.url.path:.200}"}
    return _json(ApiError(reasons.get(error.status_code, error.detail), status=error.status_code))


async def _nothing(request: Request, error: Exception) -> Response:
    return Response(status_code=400)  # nobody reads it: the client left while it sent its body
