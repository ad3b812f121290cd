"""One engine for all tests of a worker, since its programs take most of their time to compile."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("starlette", reason="starlette comes with the extra `serve`")
pytest.importorskip("uvicorn", reason="uvicorn comes with the extra `serve`")

from small_server import Small, running, small_engine

from dsv3_jax.inference import Engine


@pytest.fixture(scope="session")
def engine() -> Engine:
    """Returns an engine with a random model over bytes, for one server at a time."""
    return small_engine()


@pytest.fixture(scope="module")
def server(engine: Engine) -> Iterator[Small]:
    """Serves the engine's model with a chat template."""
    with running(engine, max_waiting=12, body_bytes=20_000, body_seconds=1.0) as small:
        yield small
