"""Checks with a short load that the server answers every client who stays, and keeps nothing of those who leave."""

from __future__ import annotations

import asyncio

import pytest
from small_server import running

from dsv3_jax.inference import Engine
from experiments.benchmarks.serving_load import KINDS, Load, settled

pytestmark = pytest.mark.slow


@pytest.mark.timeout(150)
def test_no_page_is_lost_and_no_request_unanswered(engine: Engine) -> None:
    with running(engine) as server:
        port = int(server.url.rsplit(":", 1)[1])
        load = Load(port, server.engine.context, seed=1)
        account = asyncio.run(load.run(150, at_a_time=12))
        metrics = asyncio.run(settled(port))
    assert account.wrong == []
    assert account.sent >= 150
    assert {kind for kind, _ in account.statuses} == set(KINDS)
    assert metrics["dsv3_pages_free"] == metrics["dsv3_pages"] == server.engine.sizes.pages
    assert metrics["dsv3_requests_running"] == metrics["dsv3_requests_waiting"] == 0
