"""Checks that processes that are absent, doubled, started otherwise, dead or stopped are named in one line.

The processes here are real, but only connect; `test_two_processes.py` has some that train.
"""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
from simulated import environment

_PROGRAM = """
import json, sys, time
from dsv3_jax.errors import UserError
from dsv3_jax.runs.peers import find_peers
address, index, count, options, timeout, then = json.loads(sys.argv[1])
try:
    peers = find_peers(address, index, count, options, timeout)
except UserError as error:
    sys.exit(f"refused: {error}")
print(peers.port, flush=True)
if then == "end":
    peers.wait_for_all()
elif then == "fail":
    peers.end_all(2, "no corpus")
else:
    time.sleep(then)
"""


class Started(subprocess.Popen):
    """A process that connects with others and then sleeps, ends with them, or fails."""

    def __init__(
        self, port: int, index: int, count: int = 2, timeout: float = 20, then: object = 60, **options: object
    ):
        arguments = [f"127.0.0.1:{port}", index, count, options, timeout, then]
        command = [sys.executable, "-c", _PROGRAM, json.dumps(arguments)]
        super().__init__(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())

    def connected(self) -> int:
        """Waits until all are connected and returns the port for JAX."""
        assert self.stdout is not None
        return int(self.stdout.readline())

    def ended(self) -> tuple[int, str]:
        """Returns exit code and stderr, which is at most one line."""
        error = self.communicate(timeout=50)[1].strip()
        assert "\n" not in error
        return self.returncode, error


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_all_find_each_other_and_end_together(port: int):
    processes = [Started(port, index, 3, then="end", seed=1) for index in (2, 0, 1)]
    ports = {process.connected() for process in processes}
    assert len(ports) == 1
    assert port not in ports
    assert [process.ended() for process in processes] == [(0, "")] * 3


@pytest.mark.parametrize(
    ("index", "said"),
    [(0, r"process 1, 2 of 3 did not come to process 0 in time"), (1, r"process 0 was not found at 127.0.0.1:\d+")],
)
def test_absent_processes_are_named(port: int, index: int, said: str):
    code, error = Started(port, index, 3, timeout=1).ended()
    assert code == 1
    assert re.search(said, error)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"index": 1, "count": 3}, "process 1 was started with --processes.count 3, but process 0 with 2"),
        ({"index": 1, "rate": 2.0}, "process 1 was started with rate = 2.0, but process 0 with None"),
        ({"index": 1, "seed": 2}, "process 1 was started with seed = 2, but process 0 with 1"),
    ],
)
def test_processes_that_were_started_otherwise_are_named_to_all(port: int, other: dict, said: str):
    processes = [Started(port, 0, seed=1), Started(port, **({"seed": 1} | other))]
    for process in processes:
        code, error = process.ended()
        assert (code, error.startswith("refused: ")) == (1, True)
        assert said in error


def test_a_doubled_process_is_named(port: int):
    processes = [Started(port, index, 3) for index in (0, 1, 1)]
    for process in processes:
        assert "two processes were started with --processes.index 1" in process.ended()[1]


def test_a_second_first_process_is_named(port: int):
    first = Started(port, 0, timeout=3)
    time.sleep(0.5)
    code, error = Started(port, 0).ended()
    assert (code, f"port {port} of processes.coordinator cannot be opened" in error) == (1, True)
    first.kill()
    first.communicate()


def test_a_stranger_at_the_port_does_no_harm(port: int):
    first = Started(port, 0)
    for text in (b"GET / HTTP/1.0\r\n\r\n", b"[" * 5000 + b"\n", b""):
        until = time.monotonic() + 20
        while True:
            try:
                with socket.create_connection(("127.0.0.1", port)) as stranger:
                    stranger.sendall(text)
                break
            except ConnectionRefusedError:
                assert time.monotonic() < until
                time.sleep(0.05)
    second = Started(port, 1)
    assert first.connected() == second.connected()
    for process in (first, second):
        process.kill()
        process.communicate()


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_process_that_dies_ends_the_others_at_once(port: int, lost: int):
    processes = [Started(port, index, 3) for index in range(3)]
    for process in processes:
        process.connected()
    began = time.monotonic()
    processes.pop(lost).kill()
    for process in processes:
        code, error = process.ended()
        assert (code, f"process {lost} has died or lost its connection" in error) == (4, True)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_process_that_is_stopped_ends_the_others_in_time(port: int, stopped: int):
    processes = [Started(port, index, timeout=2) for index in range(2)]
    for process in processes:
        process.connected()
    processes[stopped].send_signal(signal.SIGSTOP)
    code, error = processes[1 - stopped].ended()
    assert (code, f"process {stopped} has given no sign of life for 2 s" in error) == (4, True)
    processes[stopped].kill()
    processes[stopped].communicate()


def test_a_process_that_fails_says_so_to_the_others(port: int):
    processes = [Started(port, 0), Started(port, 1, then="fail")]
    assert processes[1].ended()[0] == 0
    code, error = processes[0].ended()
    assert (code, "process 1 has ended: no corpus" in error) == (2, True)


def test_a_process_that_fails_waits_until_the_others_have_read_why(port: int):
    """A socket that is closed with something unread would be reset, and lose the line that it had not sent yet."""
    with socket.create_server(("127.0.0.1", port)) as server:
        failing = Started(port, 1, then="fail")
        connected = server.accept()[0]
    with connected, connected.makefile("rb") as lines:
        lines.readline()
        connected.sendall(b'{"port": 1}\n{}\n{}\n')
        assert b"process 1 has ended: no corpus" in b"".join(lines)
        with pytest.raises(subprocess.TimeoutExpired):
            failing.wait(0.3)
    assert failing.ended() == (0, "")
