"""Checks the chat page in a real browser: streaming, stopping, a new chat, settings, drafts, experts."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from typing import Any

import pytest
from small_server import Small, running

from dsv3_jax.inference import Engine, Output

pytestmark = pytest.mark.slow
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright comes with the extra `dev`")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Starts the Chromium that is installed: the system's, or the one that playwright downloads."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    with sync_api.sync_playwright() as playwright:
        try:
            started = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except sync_api.Error as error:
            pytest.skip(f"no Chromium can be started ({str(error).splitlines()[0]}); playwright install chromium")
        yield started
        started.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """Opens an empty page; at the end nothing may have failed in it, nor been asked of another server."""
    errors: list[str] = []
    hosts: set[str] = set()
    page = browser.new_page()
    page.set_default_timeout(30_000)
    page.on("pageerror", lambda error: errors.append(str(error)))
    # Chromium reports answers with code 400 and 401 too, of which the page tells its user.
    page.on(
        "console", lambda said: errors.append(said.text) if said.type == "error" and "of 40" not in said.text else None
    )
    page.on("request", lambda request: hosts.add(request.url.split("/")[2].split(":")[0]))
    yield page
    page.close()
    assert errors == []
    assert hosts == {"127.0.0.1"}


def ask(page: Any, text: str) -> None:
    page.fill("#text", text)
    page.press("#text", "Enter")


def wait_for_end(page: Any) -> None:
    page.wait_for_selector("#send:not([disabled])")


def test_a_chat(server: Small, page: Any) -> None:
    page.goto(server.url)
    page.wait_for_selector("text=step 7, 128 tokens of context")
    page.fill("#temperature", "1.1")
    page.fill("#max_tokens", "40")
    page.fill("#seed", "5")
    ask(page, "a<b>")
    wait_for_end(page)
    tokens = page.locator(".assistant .token")
    shown = [tokens.nth(i).inner_text() for i in range(tokens.count())]
    assert 1 <= len(shown) <= 40
    drafted = page.locator(".assistant .token.drafted").count()
    share = page.inner_text("#share")
    assert re.match(rf"{len(shown)} tokens, {drafted} of them accepted drafts", share), share
    assert page.inner_text(".user span") == "a<b>"
    # The experts of a token: as many layers as the model has, two experts in each.
    tokens.filter(has_text=re.compile(r"[A-Za-z0-9]")).first.hover()
    rows = page.locator("#experts tr")
    assert rows.count() == server.engine.model_config.num_moe_layers
    chosen = page.locator("#experts tr").first.locator("td").nth(1).inner_text().split(", ")
    assert len(chosen) == server.engine.model_config.num_experts_per_tok
    assert all(0 <= int(each) < server.engine.model_config.n_routed_experts for each in chosen)
    # With the same seed and prompt a new chat gives the same answer, and holds nothing of the old one.
    page.click("#new")
    assert page.locator(".turn").count() == 0
    ask(page, "a<b>")
    wait_for_end(page)
    assert [tokens.nth(i).inner_text() for i in range(tokens.count())] == shown
    ask(page, "b" * 200)
    page.wait_for_selector(".wrong")
    assert "the model's context is 128" in page.inner_text(".wrong")


def test_stop_and_a_new_chat_while_an_answer_comes(server: Small, page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Engine.step

    def slow(self: Engine) -> list[Output]:
        time.sleep(0.2)
        return step(self)

    monkeypatch.setattr(Engine, "step", slow)
    page.goto(server.url)
    page.wait_for_selector("text=step 7")
    ask(page, "a")
    page.wait_for_selector(".assistant .token", state="attached")
    page.click("#stop")
    page.wait_for_selector("text=Stopped.")
    wait_for_end(page)
    ask(page, "b")
    page.wait_for_selector(".assistant >> nth=1 >> .token", state="attached")
    page.click("#new")
    assert page.locator(".turn").count() == 0
    assert page.is_enabled("#send")
    monkeypatch.undo()
    ask(page, "c")
    page.wait_for_selector(".assistant .token", state="attached")
    wait_for_end(page)


def test_a_base_model_and_a_key(engine: Engine, page: Any) -> None:
    with running(engine, chat=False, api_key="secret") as server:
        page.goto(server.url)
        page.wait_for_selector("text=the API key is missing or wrong")
        page.fill("#key", "secret")
        page.press("#key", "Tab")
        page.wait_for_selector("text=This is a base model without a chat template")
        page.fill("#max_tokens", "9")
        ask(page, "def ")
        wait_for_end(page)
        assert page.locator(".assistant .token").count() >= 1
        page.close()
