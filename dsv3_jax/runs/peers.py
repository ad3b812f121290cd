"""A connection of every process of a run with the first one, apart from JAX's own.

It is made before JAX is started, so that processes that are absent, doubled, or started with other options are named
instead of trained with. It stays open: a process that ends closes it, and one that is stopped sends nothing more.
Threads watch it, so that a lost process is noticed while the main thread compiles or waits for a collective.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from dsv3_jax.errors import UserError, reason_of
from dsv3_jax.terminal import say

PEERS_LOST = 4
"""Exit code of a process that has lost the others."""

_LONGEST_MESSAGE = 1 << 20  # bytes
_PORTS_TRIED = 20  # above the coordinator's, for JAX
_LONGEST_PAUSE = 5.0  # seconds between two signs of life
_LONGEST_PARTING = 2.0  # seconds that a failed process waits for the others to read why


class Peers:
    """The other processes of a run.

    Args:
      index: number of this process.
      count: number of processes.
      connections: the connections by the number of the process at the other end: all others on process 0, and process
        0 on the others.
      timeout: seconds without a sign of life after which a process is taken as lost.

    Attributes:
      timeout: the timeout.
      port: the port of process 0 where JAX connects the processes.
      last_words: returns what a user can do when this process ends because another one was lost.
    """

    def __init__(self, index: int, count: int, connections: dict[int, _Connection], timeout: float, port: int):
        self.index, self.count, self.port = index, count, port
        self.last_words: Callable[[], str] = lambda: "run the same command again"
        self.timeout, self._connections = timeout, connections
        self._ended = threading.Semaphore(0)
        self._ending = False
        self._one_ends_all = threading.Lock()
        self._listeners = [
            threading.Thread(target=self._listen, args=(other, connection), name=f"peer-{other}", daemon=True)
            for other, connection in connections.items()
        ]
        for listener in self._listeners:
            listener.start()
        threading.Thread(target=self._give_signs_of_life, name="peers", daemon=True).start()

    def wait_for_all(self) -> None:
        """Waits until all processes have called this, but no longer than the timeout."""
        self._ending = True
        until = time.monotonic() + self.timeout
        if self.index:
            self._tell_others({"end": True})
        for _ in self._connections:
            self._ended.acquire(timeout=max(0.0, until - time.monotonic()))
        if not self.index:
            self._tell_others({"end": True})

    def end_all(self, exit_code: int, reason: str) -> None:
        """Makes the other processes end too, since this one ends for `reason` (a line of text)."""
        self._ending = True
        self._tell_others({"leaving": exit_code, "why": f"process {self.index} has ended: {reason}"})
        # A socket closed with something unread is reset, and what it has not sent yet is lost: the others close first.
        for connection in self._connections.values():
            connection.end_sending()
        until = time.monotonic() + _LONGEST_PARTING
        for listener in self._listeners:
            listener.join(max(0.0, until - time.monotonic()))

    def _listen(self, other: int, connection: _Connection) -> None:
        connection.socket.settimeout(self.timeout)
        while True:
            try:
                message = connection.receive()
            except TimeoutError:
                self.lose(PEERS_LOST, f"process {other} has given no sign of life for {self.timeout:g} s")
                return
            except OSError:
                message = None
            if message is None:
                self.lose(PEERS_LOST, f"process {other} has died or lost its connection")
                return
            if "leaving" in message:
                self.lose(message["leaving"], message["why"])
                return
            if "end" in message:
                self._ended.release()
                return

    def lose(self, exit_code: int, why: str) -> None:
        """Ends this process, whose main thread may be waiting for the one that was lost."""
        with self._one_ends_all:
            if self._ending:
                self._ended.release()
                return
            if not self.index:
                self._tell_others({"leaving": exit_code, "why": why})
            say_last_words(f"process {self.index} of {self.count}: {why}; {self.last_words()}")
            os._exit(exit_code)

    def _give_signs_of_life(self) -> None:
        while True:
            self._tell_others({})
            time.sleep(min(_LONGEST_PAUSE, self.timeout / 4))

    def _tell_others(self, message: dict[str, Any]) -> None:
        for connection in self._connections.values():
            with contextlib.suppress(OSError):  # the thread that listens to it notices
                connection.send(message)


class _Connection:
    """Sends and receives JSON objects, one a line."""

    def __init__(self, connected: socket.socket):
        self.socket = connected
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # the last line may have no time to wait
        self._lines = connected.makefile("rb")
        self._sending = threading.Lock()

    def send(self, message: dict[str, Any]) -> None:
        with self._sending:
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def end_sending(self) -> None:
        """Lets the other end know that nothing more comes; it can still send."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)

    def receive(self) -> dict[str, Any] | None:
        """Returns the next message; None where the other end has closed the connection or is no process of a run."""
        line = self._lines.readline(_LONGEST_MESSAGE)
        try:
            message = json.loads(line) if line.endswith(b"\n") else None
        except (ValueError, RecursionError):
            return None
        return message if isinstance(message, dict) else None


def find_peers(address: str, index: int, count: int, options: dict[str, Any], timeout: float) -> Peers:
    """Connects this process with the others and checks that all were started alike.

    Args:
      address: HOST:PORT of process 0.
      index: number of this process.
      count: number of processes.
      options: everything that must be the same for all processes, by name.
      timeout: seconds to wait for the others.

    Raises:
      UserError: a process is absent, doubled, or was started with other options; the message names it.
    """
    host, _, port = address.rpartition(":")
    until = time.monotonic() + timeout
    if index == 0:
        connections = _gather(int(port), count, options, until)
        return Peers(0, count, connections, timeout, _tell_port(connections, int(port)))
    connection = _reach(host.strip("[]"), int(port), address, until)
    connection.socket.settimeout(max(1.0, until - time.monotonic() + 5))  # process 0 gives up first, and says why
    try:
        connection.send({"index": index, "count": count, "options": options})
        answer = connection.receive()
    except TimeoutError:
        raise UserError(f"{address} (processes.coordinator) does not answer like process 0 of a run") from None
    except OSError as error:
        raise UserError(f"the connection with process 0 was lost: {reason_of(error)}") from None
    if answer is None:
        raise UserError("process 0 has ended while it waited for the other processes")
    if "problem" in answer:
        raise UserError(answer["problem"])
    return Peers(index, count, {0: connection}, timeout, answer["port"])


def say_last_words(text: str) -> None:
    """Prints one line on stderr, before the process is ended."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        say(f"dsv3: {' '.join(text.split())}", to=sys.stderr)


def _gather(port: int, count: int, options: dict[str, Any], until: float) -> dict[int, _Connection]:
    """Waits, on process 0, until all others have come.

    Raises:
      UserError: one has not come in time, or one that came does not belong here. Those that came are told.
    """
    found: dict[int, _Connection] = {}
    with _listener(port) as listener:
        while len(found) < count - 1:
            listener.settimeout(max(0.01, until - time.monotonic()))
            try:
                connection = _Connection(listener.accept()[0])
                connection.socket.settimeout(5.0)
                hello = connection.receive()
            except TimeoutError:
                if time.monotonic() < until:
                    continue  # a connection that says nothing
                missing = ", ".join(str(other) for other in range(1, count) if other not in found)
                _refuse([*found.values()], f"process {missing} of {count} did not come to process 0 in time")
            except OSError:
                continue
            if hello is None or "index" not in hello:
                continue  # something else that tried the port
            if problem := _what_differs(hello, found, count, options):
                _refuse([*found.values(), connection], problem)
            found[hello["index"]] = connection
    return found


def _what_differs(hello: dict[str, Any], found: dict[int, _Connection], count: int, options: dict[str, Any]) -> str:
    index, theirs = hello["index"], hello["options"]
    if hello["count"] != count:
        return f"process {index} was started with --processes.count {hello['count']}, but process 0 with {count}"
    if index in found or index == 0:
        return f"two processes were started with --processes.index {index}: each needs its own"
    for name in (*options, *(theirs.keys() - options.keys())):
        if theirs.get(name) != options.get(name):
            return (
                f"process {index} was started with {name} = {theirs.get(name)!r}, but process 0 with "
                f"{options.get(name)!r}: all must be started with the same options"
            )
    return ""


def _refuse(connections: list[_Connection], problem: str) -> None:
    for connection in connections:
        with contextlib.suppress(OSError):
            connection.send({"problem": problem})
    raise UserError(problem)


def _tell_port(connections: dict[int, _Connection], above: int) -> int:
    """Chooses a free port for JAX and tells it the others."""
    candidates = (*range(above + 1, min(above + _PORTS_TRIED, 65536)), 0)
    for candidate in candidates:
        with contextlib.suppress(UserError), _listener(candidate) as listener:
            port = listener.getsockname()[1]
            break
    else:
        raise UserError(f"no port near {above} is free")
    for connection in connections.values():
        with contextlib.suppress(OSError):
            connection.send({"port": port})
    return port


def _listener(port: int) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        raise UserError(
            f"port {port} of processes.coordinator cannot be opened ({reason_of(error)}): another program uses it, or "
            "a second process 0"
        ) from None


def _reach(host: str, port: int, address: str, until: float) -> _Connection:
    """Connects with process 0, which may start later than this process."""
    while True:
        try:
            connected = socket.create_connection((host, port), timeout=max(0.1, until - time.monotonic()))
            return _Connection(connected)
        except OSError as error:
            if time.monotonic() > until:
                raise UserError(
                    f"process 0 was not found at {address} in time ({reason_of(error)}): check that it is started, "
                    "with the same --processes.coordinator"
                ) from None
        time.sleep(0.2)
