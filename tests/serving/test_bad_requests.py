"""Checks that bad requests get the API's error object, and that clients who leave or dawdle hold nothing."""

from __future__ import annotations

import json
import socket
import threading
import time
from typing import Any

import httpx
import pytest
from small_server import Small, running

from dsv3_jax.data.control_tokens import USER
from dsv3_jax.inference import Engine

pytestmark = pytest.mark.slow

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]
NO_END = {"logit_bias": {str(token): -100 for token in range(3)}}


def refused(server: Small, path: str, body: Any, **options: Any) -> tuple[int, dict[str, Any]]:
    """Returns the status and the error of a request, after checking its form."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json"} | options.pop("headers", {})
    answer = httpx.post(server.url + path, content=content, headers=headers, timeout=30, **options)
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    assert "Traceback" not in answer.text
    return answer.status_code, error


@pytest.mark.parametrize(
    ("path", "body", "message", "param"),
    [
        (TEXT, b"{", "not valid JSON", None),
        (TEXT, b"\xff\xfe", "not valid JSON", None),
        (TEXT, b"[1]", "expected a JSON object", None),
        (TEXT, b'{"prompt": "a", "prompt": "b"}', "appears twice", None),
        (TEXT, b'{"temperature": NaN}', "NaN is not JSON", None),
        (TEXT, b"[" * 5000, "nested deeper than 100", None),
        (TEXT, {"prompt": "a" * 128}, "128 tokens, but the model's context is 128", "prompt"),
        (TEXT, {"prompt": "a" * 100, "max_tokens": 29}, "ask for at most 28", "max_tokens"),
        (TEXT, {"prompt": []}, "'prompt' must be a text", "prompt"),
        (TEXT, {"prompt": [1, "a"]}, "'prompt' must be a text", "prompt"),
        (TEXT, {"prompt": [[1], []]}, "'prompt' must be a text", "prompt"),
        (TEXT, {"prompt": 7}, "'prompt' must be a text", "prompt"),
        (TEXT, {"prompt": [300]}, "token 300, outside the model's vocabulary", None),
        (TEXT, {"prompt": [-1]}, "'prompt' must be a text", "prompt"),
        (TEXT, {"prompt": "\ud800"}, "lone surrogate", "prompt"),
        (TEXT, {"temperature": -0.1}, "'temperature' must be a number from 0 to 100, not -0.1", "temperature"),
        (TEXT, {"temperature": "hot"}, "not 'hot'", "temperature"),
        (TEXT, {"temperature": True}, "not True", "temperature"),
        (TEXT, {"top_p": 1.5}, "'top_p'", "top_p"),
        (TEXT, {"top_p": 0}, "top_p must be above 0", None),
        (TEXT, {"top_k": 0}, "'top_k'", "top_k"),
        (TEXT, {"min_p": 2}, "'min_p'", "min_p"),
        (TEXT, {"repetition_penalty": 0}, "'repetition_penalty'", "repetition_penalty"),
        (TEXT, {"presence_penalty": 3}, "'presence_penalty'", "presence_penalty"),
        (TEXT, {"frequency_penalty": -3}, "'frequency_penalty'", "frequency_penalty"),
        (TEXT, {"logit_bias": {"a": 1}}, "'logit_bias'", "logit_bias"),
        (TEXT, {"logit_bias": {"1": 101}}, "'logit_bias'", "logit_bias"),
        (TEXT, {"logit_bias": {"999": 1}}, "token 999, outside", None),
        (TEXT, {"max_tokens": 0}, "'max_tokens'", "max_tokens"),
        (TEXT, {"n": 0}, "'n' must be a whole number from 1 to 128", "n"),
        (TEXT, {"n": 65, "prompt": ["a", "b"]}, "more than 128 completions", "n"),
        (TEXT, {"best_of": 2}, "'best_of' must equal 'n'", "best_of"),
        (TEXT, {"logprobs": 21}, "'logprobs'", "logprobs"),
        (TEXT, {"seed": 0.5}, "'seed'", "seed"),
        (TEXT, {"stop": ""}, "'stop'", "stop"),
        (TEXT, {"stop": ["a"] * 17}, "'stop'", "stop"),
        (TEXT, {"stop": 3}, "'stop'", "stop"),
        (TEXT, {"stream": 1}, "'stream' must be true or false", "stream"),
        (TEXT, {"stream_options": {"include_usage": True}}, "'stream_options'", "stream_options"),
        (TEXT, {"echo": True}, "'echo' is not supported", "echo"),
        (TEXT, {"suffix": "b"}, "'suffix' is not supported", "suffix"),
        (TEXT, {"tempreature": 1}, "no parameter 'tempreature'", "tempreature"),
        (CHAT, {}, "the chat has no messages", "messages"),
        (CHAT, {"messages": []}, "the chat has no messages", "messages"),
        (CHAT, {"messages": "hi"}, "'messages' must be a list", "messages"),
        (CHAT, {"messages": ["hi"]}, "each of 'messages' must be an object", "messages"),
        (CHAT, {"messages": [{"role": "robot", "content": "a"}]}, "role 'robot'; it must be one of", "messages"),
        (CHAT, {"messages": [{"role": "user"}]}, "content of message 0 must be text", "messages"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "must be texts", "messages"),
        (CHAT, {"messages": [{"role": "tool", "content": "4"}]}, "no turns of the role tool", "messages"),
        (CHAT, {"messages": [{"role": "user", "content": "a" * 200}]}, "tokens, but the model's context", "messages"),
        (CHAT, {"messages": HELLO, "top_logprobs": 2}, "'top_logprobs' needs 'logprobs'", "top_logprobs"),
        (CHAT, {"messages": HELLO, "tools": [{"type": "function"}]}, "'tools' is not supported", "tools"),
        (CHAT, {"messages": HELLO, "response_format": {"type": "json_object"}}, "not supported", "response_format"),
        (CHAT, {"messages": HELLO, "prompt": "a"}, "no parameter 'prompt'", "prompt"),
    ],
)
def test_bad_bodies(server: Small, path: str, body: Any, message: str, param: str | None) -> None:
    if isinstance(body, dict) and path == TEXT:
        body = {"prompt": "a"} | body
    status, error = refused(server, path, body)
    assert (status, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert message in error["message"]


def test_other_errors_have_the_same_form(server: Small) -> None:
    status, error = refused(server, CHAT, {"model": "gpt-9", "messages": HELLO})
    assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert "this server has 'small'" in error["message"]
    assert refused(server, "/v2/completions", {})[0] == 404
    assert refused(server, "/health", {})[0] == 405
    assert httpx.get(server.url + CHAT).json()["error"]["message"] == f"GET is not for {CHAT}"
    assert refused(server, TEXT, {}, headers={"content-type": "text/plain"})[0] == 415
    assert refused(server, TEXT, {}, headers={"host": "evil.example"})[0] == 403
    assert refused(server, TEXT, {"prompt": "a" * 30_000})[0] == 413


def test_a_body_that_does_not_end(server: Small) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        head = (
            f"POST {TEXT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{{"
        )
        connection.sendall(head.encode())
        assert b" 408 " in connection.recv(4096).splitlines()[0]


def free_again(server: Small, seconds: float = 20.0) -> bool:
    until = time.monotonic() + seconds
    while server.engine.has_work and time.monotonic() < until:
        time.sleep(0.02)
    return not server.engine.has_work and server.engine.free_pages == server.engine.sizes.pages


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_pages(server: Small, stream: bool) -> None:
    """The 4 x 8 completions would take far longer than the test waits for their pages."""
    written = server.engine.statistics.written_tokens
    body = {"prompt": "a", "max_tokens": 120, "n": 8, "stream": stream, **NO_END}
    clients = [httpx.Client(timeout=httpx.Timeout(10, read=10 if stream else 0.3)) for _ in range(2)]
    for client in clients:
        with client:
            try:
                with client.stream("POST", server.url + TEXT, json=body) as answer:
                    assert answer.status_code == 200
                    next(answer.iter_lines())
            except httpx.ReadTimeout:
                assert not stream
    assert free_again(server)
    assert server.engine.statistics.written_tokens - written < 2 * 8 * 120


def test_too_many_requests_wait(server: Small) -> None:
    body = {"prompt": "a", "max_tokens": 120, "n": 12, **NO_END}
    answers: list[httpx.Response] = []
    threads = [
        threading.Thread(target=lambda: answers.append(httpx.post(server.url + TEXT, json=body, timeout=120)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    statuses = sorted(answer.status_code for answer in answers)
    assert statuses[0] == 200
    assert statuses[-1] == 503
    busy = next(answer for answer in answers if answer.status_code == 503)
    assert busy.headers["retry-after"] == "1"
    assert busy.json()["error"]["code"] == "overloaded"
    assert httpx.post(server.url + TEXT, json={**body, "n": 17}).status_code == 503  # more than ever fit
    assert free_again(server)


def test_key_time_out_and_base_model(engine: Engine) -> None:
    with running(engine, chat=False, api_key="secret", request_seconds=0.2) as server:
        for given in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Bearer sécret".encode()}):
            status, error = refused(server, TEXT, {"prompt": "a"}, headers=given)
            assert (status, error["code"], error["type"]) == (401, "invalid_api_key", "authentication_error")
            assert httpx.get(server.url + "/metrics", headers=given).status_code == 401
        assert httpx.get(server.url + "/health").status_code == httpx.get(server.url + "/").status_code == 200
        key = {"authorization": "Bearer secret"}
        assert httpx.get(server.url + "/v1/models", headers=key).json()["data"][0]["has_chat_template"] is False
        status, error = refused(server, CHAT, {"messages": HELLO}, headers=key)
        assert (status, error["code"]) == (400, "no_chat_template")
        slow = {"prompt": "a", "max_tokens": 120, "n": 16, **NO_END}
        status, error = refused(server, TEXT, slow, headers=key)
        assert (status, error["code"]) == (504, "timeout")
        lines = httpx.post(server.url + TEXT, json={**slow, "stream": True}, headers=key).text.split("\n\n")
        assert json.loads(lines[-3].removeprefix("data: "))["error"]["code"] == "timeout"
        assert lines[-2] == "data: [DONE]"
        assert free_again(server)


def test_running_requests_end_before_the_server_does(engine: Engine) -> None:
    lines: list[str] = []
    began = threading.Event()

    def read(url: str) -> None:
        body = {"prompt": USER, "max_tokens": 60, "stream": True, **NO_END}
        with httpx.stream("POST", url + TEXT, json=body, timeout=60) as answer:
            for line in answer.iter_lines():
                lines.append(line)
                began.set()

    with running(engine) as server:
        thread = threading.Thread(target=read, args=(server.url,))
        thread.start()
        assert began.wait(20)
    thread.join(20)
    assert lines[-2] == "data: [DONE]"
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.url + "/health")


def test_an_engine_that_fails(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise RuntimeError("no device any more")

    with running(engine) as server:
        monkeypatch.setattr(engine, "step", fail)
        status, error = refused(server, TEXT, {"prompt": "a"})
        assert (status, error["code"]) == (500, "engine_failed")
        assert httpx.get(server.url + "/health").status_code == 503
        assert refused(server, TEXT, {"prompt": "a"})[0] == 503
    monkeypatch.undo()
    for number in list(engine._sequences):
        engine.cancel(number)
    assert "no device any more" in capfd.readouterr().err
