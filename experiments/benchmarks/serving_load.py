"""A load test of `dsv3 serve`: ordinary requests, clients that leave, prompts that are too long, and broken bodies.

    python experiments/benchmarks/serving_load.py runs/nano                    2,000 requests
    python experiments/benchmarks/serving_load.py runs/nano --minutes 10       a soak

It starts the server itself, on 127.0.0.1 alone. Every request must be answered as it should be unless its client left;
at the end no page of the cache may be held, and the server's memory must not have grown. The exit code is 1 if not.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
# Kind of request: how often it comes.
KINDS = {
    "whole": 25,
    "stream": 20,
    "several": 5,
    "chat": 5,
    "leave while it streams": 15,
    "leave while it waits": 8,
    "leave within the body": 4,
    "prompt too long": 8,
    "broken body": 7,
    "no HTTP": 3,
}
_MALFORMED = (
    b"{",
    b"",
    b"[]",
    b"null",
    b"\xff\xfe\x00",
    b'{"prompt": }',
    b'{"temperature": "hot"}',
    b'{"n": -1}',
    b"{" * 900,
)
_ANSWER_SECONDS = 120.0  # a request without an answer for so long is counted as unanswered


@dataclasses.dataclass
class Account:
    """What became of the requests.

    Attributes:
      statuses: number of requests by kind and HTTP status, or "left".
      wrong: requests that were not answered, or not as they should have been, in words.
      first_token: of each stream, seconds until its first event, and when it was sent.
      memory: bytes that the server held, at intervals.
    """

    statuses: Counter[tuple[str, str]] = dataclasses.field(default_factory=Counter)
    wrong: list[str] = dataclasses.field(default_factory=list)
    first_token: list[tuple[float, float]] = dataclasses.field(default_factory=list)
    memory: list[int] = dataclasses.field(default_factory=list)

    @property
    def sent(self) -> int:
        """Number of requests."""
        return self.statuses.total()


class Load:
    """Sends random requests to a server.

    Args:
      port: where it listens, on 127.0.0.1.
      context: most tokens of a request.
      seed: of what is sent.
      memory: returns the bytes that the server holds now.
    """

    def __init__(self, port: int, context: int, seed: int, memory: Callable[[], int] = lambda: 0):
        self._port, self._context, self._memory = port, context, memory
        self._random = random.Random(seed)
        self.account = Account()

    async def run(self, requests: int, at_a_time: int, seconds: float | None = None) -> Account:
        """Sends requests, so many at a time; with `seconds`, until they are over."""
        end = None if seconds is None else time.monotonic() + seconds
        started = 0

        async def client() -> None:
            nonlocal started
            while (time.monotonic() < end) if end else (started < requests):
                if started % max(requests // 20, 1) == 0:
                    self.account.memory.append(self._memory())
                started += 1
                await self._one()

        await asyncio.gather(*(client() for _ in range(at_a_time)))
        self.account.memory.append(self._memory())
        return self.account

    async def _one(self) -> None:
        (kind,) = self._random.choices(list(KINDS), list(KINDS.values()))
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                status, problem = await self._send(kind)
        except (TimeoutError, OSError, ValueError, asyncio.IncompleteReadError) as error:
            status, problem = "none", f"no answer ({type(error).__name__} {error})"
        self.account.statuses[kind, status] += 1
        if problem:
            self.account.wrong.append(f"{kind}: {problem}")

    async def _send(self, kind: str) -> tuple[str, str]:
        """Sends a request; returns its status, and what is wrong with the answer."""
        draw = self._random
        path, body, wanted = TEXT, self._body(), {"200", "503"}
        if kind == "several":
            body["n"] = draw.randint(2, 4)
        elif kind == "chat":
            path, text = CHAT, body.pop("prompt")
            body["messages"] = [{"role": "user", "content": text[: self._context // 4]}]
            wanted = {"200", "400", "503"}  # 400 if the model has no template
        elif kind == "prompt too long":
            body["prompt"], wanted = "x y " * self._context, {"400"}
        elif kind in ("stream", "leave while it streams"):
            body["stream"] = True
        data = json.dumps(body).encode()
        if kind == "broken body":
            data, wanted = draw.choice(_MALFORMED), {"400"}
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n"
        message = head.encode() + data
        if kind == "no HTTP":
            message, wanted = draw.randbytes(draw.randint(1, 300)).replace(b"\n", b"") + b"\r\n\r\n", {"400"}
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        with contextlib.closing(writer):
            if kind == "leave within the body":
                writer.write(message[: len(head) + draw.randrange(len(data))])
                await writer.drain()
                return "left", ""
            writer.write(message)
            await writer.drain()
            if kind == "leave while it waits":
                await asyncio.sleep(draw.expovariate(10))
                return "left", ""
            began = time.monotonic()
            status = (await reader.readline()).split()[1].decode()
            while (await reader.readline()).strip():
                pass  # headers
            if status not in wanted:
                return status, f"status {status}"
            if status == "200" and body.get("stream"):
                return await self._read_stream(reader, began, leaves=kind == "leave while it streams")
            answer = await reader.read()
            return status, _problem(kind, status, answer, body.get("n", 1))

    async def _read_stream(self, reader: asyncio.StreamReader, began: float, *, leaves: bool) -> tuple[str, str]:
        last = b""
        patience = self._random.randint(1, 6) if leaves else None
        while line := await reader.readline():
            if not line.startswith(b"data: "):
                continue
            if not last:
                self.account.first_token.append((time.monotonic() - began, began))
            last = line.strip()
            if patience is not None and (patience := patience - 1) == 0:
                return "left", ""
        return "200", "" if last == b"data: [DONE]" else f"the stream ended with {last[:80]!r}"

    def _body(self) -> dict[str, Any]:
        draw = self._random
        words = [draw.choice(["def", "class", "return", "(x)", "\n", "é"]) for _ in range(draw.randint(1, 12))]
        body: dict[str, Any] = {
            "prompt": " ".join(words),
            "max_tokens": draw.randint(1, 40),
            "seed": draw.randrange(99),
        }
        extras = {"temperature": 0, "logprobs": 2, "stop": ["\n\n"], "top_p": 0.5, "presence_penalty": 1.0}
        return body | {name: extras[name] for name in draw.sample(list(extras), draw.randint(0, 2))}


def _problem(kind: str, status: str, answer: bytes, choices: int) -> str:
    """Returns what is wrong with the body of an answer."""
    if kind == "no HTTP":
        return ""
    body = json.loads(answer.partition(b"\r\n")[2].rpartition(b"\r\n0\r\n")[0] if answer[:1] != b"{" else answer)
    if status != "200":
        return "" if body["error"]["message"] else "an error without a message"
    ends = [choice["finish_reason"] for choice in body["choices"]]
    return "" if len(ends) == choices and set(ends) <= {"stop", "length"} else f"finish reasons {ends}"


async def get(port: int, path: str) -> str:
    """Returns the body of a page of the server."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with contextlib.closing(writer):
        writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
        return (await reader.read()).decode().partition("\r\n\r\n")[2]


async def settled(port: int, seconds: float = 60.0) -> dict[str, float]:
    """Returns the server's metrics once nothing runs or waits any more, or after so many seconds."""
    end = time.monotonic() + seconds
    while True:
        lines = [line for line in (await get(port, "/metrics")).splitlines() if not line.startswith("#")]
        values = {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}
        busy = values["dsv3_requests_running"] + values["dsv3_requests_waiting"]
        if (not busy and values["dsv3_pages_free"] == values["dsv3_pages"]) or time.monotonic() > end:
            return values
        await asyncio.sleep(0.1)


def _resident(process: int) -> int:
    for line in Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def _report(
    account: Account, metrics: dict[str, float], began: float, seconds: float, at_a_time: int
) -> dict[str, Any]:
    """Returns the figures of a test that began at that time and took so many seconds."""
    settled_memory = account.memory[len(account.memory) // 4 :]  # after the allocator's pools have filled
    waits = sorted(account.first_token) or [(0.0, began)]
    ordered = [wait for wait, _ in waits]
    return {
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "requests": account.sent,
        "at_a_time": at_a_time,
        "seconds": round(seconds, 1),
        "requests_per_second": round(account.sent / seconds, 1),
        "tokens_per_second": round(metrics["dsv3_written_tokens_total"] / seconds, 1),
        "first_event_median_seconds": round(statistics.median(ordered), 3),
        "first_event_99_percent_seconds": round(ordered[int(0.99 * (len(ordered) - 1))], 3),
        "first_event_slowest_seconds": round(ordered[-1], 3),
        "first_event_slowest_sent_at_seconds": round(waits[-1][1] - began, 1),
        "wrong_answers": account.wrong,
        "pages": metrics["dsv3_pages"],
        "pages_held_at_the_end": metrics["dsv3_pages"] - metrics["dsv3_pages_free"],
        "memory_mib": [round(value / 2**20, 1) for value in account.memory],
        "memory_growth_percent": round(100 * (settled_memory[-1] / settled_memory[0] - 1), 2),
        "by_kind_and_status": {f"{kind}, {status}": n for (kind, status), n in sorted(account.statuses.items())},
    }


def main() -> int:
    """Runs the load test, prints and keeps the figures; returns 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a training run")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--minutes", type=float, help="send requests for so long instead")
    parser.add_argument("--at-a-time", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file for the figures (JSON)")
    options = parser.parse_args()
    command = [sys.executable, "-m", "dsv3_jax.cli.main", "serve", str(options.run), "--port", "0", "--context", "128"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=sys.stderr, text=True) as server:
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            print(line, end="")
            port = int(line.partition("http://127.0.0.1:")[2].partition(";")[0])
            load = Load(port, 128, options.seed, lambda: _resident(server.pid))
            began = time.monotonic()
            length = None if options.minutes is None else 60 * options.minutes
            account = asyncio.run(load.run(options.requests, options.at_a_time, length))
            seconds = time.monotonic() - began
            metrics = asyncio.run(settled(port))
        finally:
            server.terminate()
    report = _report(account, metrics, began, seconds, options.at_a_time)
    print(json.dumps(report, indent=1))
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    bad = account.wrong or report["pages_held_at_the_end"] or report["memory_growth_percent"] > 5 or server.returncode
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
