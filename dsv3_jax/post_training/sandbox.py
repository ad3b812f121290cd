"""Runs Python that a model wrote where it can do no harm, and returns what its functions answer.

The program runs in a process of its own: no network, no files but Python's own, nothing of our environment, limits of
CPU time, memory, files, processes and output; it is killed with all it started when its time is over. Linux only.
Expected answers never enter the sandbox: a program that knows that it is tested still has to compute them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from dsv3_jax.errors import UserError

_CHILD = Path(__file__).with_name("sandboxed_child.py")
_SYSTEM = ("/usr/lib", "/usr/lib64", "/lib", "/lib64")
_FIRST_USER = 0x70000000  # users that no system has; each sandbox has its own, so that limits on processes are apart

Outcome = Literal["answered", "failed", "timeout", "too much output"]


@dataclasses.dataclass(frozen=True)
class SandboxLimits:
    """What a program may use.

    Attributes:
      seconds: of wall-clock time; CPU time is limited to the same, rounded up.
      memory_bytes: of address space per process.
      disk_bytes: of all files it writes, which are in memory.
      output_bytes: of standard output and error together.
      processes: at a time, the program itself included.
    """

    seconds: float = 5.0
    memory_bytes: int = 512 << 20
    disk_bytes: int = 8 << 20
    output_bytes: int = 1 << 16
    processes: int = 8


@dataclasses.dataclass(frozen=True)
class SandboxResult:
    """What came of a program.

    Attributes:
      outcome: "answered" when it ended by itself with exit code 0.
      answers: the JSON value that each call returned; empty unless it answered.
      output: what it printed, cut at the limit.
    """

    outcome: Outcome
    answers: tuple[Any, ...]
    output: str


def call_in_sandbox(
    program: str, function: str, arguments: Sequence[Sequence[Any]], limits: SandboxLimits | None = None
) -> SandboxResult:
    """Runs `program`, then calls its `function` with each of the lists of arguments, and returns the results.

    Args:
      program: Python source code.
      function: the name of a function that it defines.
      arguments: JSON values, one list of positional arguments per call.

    Raises:
      UserError: this machine cannot isolate a process.
    """
    limits = SandboxLimits() if limits is None else limits
    mark = secrets.token_hex(16)  # tells our line from what the program prints
    source = (
        f"{program}\n\n"
        "import json as _json, sys as _sys\n"
        f"_results = [{function}(*_a) for _a in _json.loads({json.dumps(json.dumps(list(arguments)))})]\n"
        f"_sys.stdout.write('\\n{mark}' + _json.dumps(_results) + '\\n')\n"
    )
    outcome, output = _run(source, limits)
    before, found, line = output.rpartition(f"\n{mark}")
    if outcome != "answered" or not found:
        return SandboxResult("failed" if outcome == "answered" else outcome, (), output)
    try:
        answers = tuple(json.loads(line))
    except (ValueError, TypeError, RecursionError):
        return SandboxResult("failed", (), output)
    if len(answers) != len(arguments):
        return SandboxResult("failed", (), output)
    return SandboxResult("answered", answers, before)


@functools.cache
def why_unavailable() -> str | None:
    """Returns why this machine cannot isolate a process, in one line; None where it can."""
    if not sys.platform.startswith("linux"):
        return "a sandbox needs Linux"
    outcome, output = _start("print('whole')", SandboxLimits())
    if outcome == "answered" and output.strip() == "whole":
        return None
    last = output.strip().splitlines()[-1:] or [outcome]
    return f"this machine does not let a process be isolated ({last[0][:200]})"


def _run(source: str, limits: SandboxLimits) -> tuple[Outcome, str]:
    if (reason := why_unavailable()) is not None:
        raise UserError(f"programs of a model are only run in a sandbox, and {reason}; use a reward without programs")
    return _start(source, limits)


def _start(source: str, limits: SandboxLimits) -> tuple[Outcome, str]:
    seconds = int(-(-limits.seconds // 1))
    python = os.path.realpath(sys.executable)
    with tempfile.TemporaryDirectory(prefix="sandbox-") as root:
        order = {
            "root": root,
            "python": python,
            "visible": _visible_folders(python),
            "disk_bytes": limits.disk_bytes,
            "user": _FIRST_USER + secrets.randbelow(1 << 20),
            "limits": {
                "RLIMIT_CPU": seconds,
                "RLIMIT_AS": limits.memory_bytes,
                "RLIMIT_FSIZE": limits.disk_bytes,
                "RLIMIT_NOFILE": 64,
                "RLIMIT_NPROC": limits.processes,
                "RLIMIT_CORE": 0,
            },
        }
        child = subprocess.Popen(
            [python, "-I", "-S", str(_CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={},
            cwd="/",
            start_new_session=True,
        )
        try:
            _send(child, json.dumps(order).encode() + b"\n" + source.encode("utf-8", "replace"))
            return _read(child, limits)
        finally:
            # The kernel kills the program and all that it started with this process.
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
            assert child.stdout is not None
            child.stdout.close()


def _visible_folders(python: str) -> list[str]:
    """Returns the folders that Python needs, each once and none inside another."""
    folders = {os.path.realpath(folder) for folder in (*_SYSTEM, os.path.dirname(os.__file__)) if os.path.isdir(folder)}
    folders |= {folder for folder in ("/lib", "/lib64") if os.path.isdir(folder)}
    folders |= {os.path.dirname(python), os.path.join(sys.base_prefix, "lib")}
    return sorted(f for f in folders if not any(f != other and f.startswith(other + "/") for other in folders))


def _send(child: subprocess.Popen[bytes], data: bytes) -> None:
    assert child.stdin is not None
    try:
        child.stdin.write(data)
        child.stdin.close()
    except BrokenPipeError:  # it ended before it read all; its output says why
        pass


def _read(child: subprocess.Popen[bytes], limits: SandboxLimits) -> tuple[Outcome, str]:
    assert child.stdout is not None
    end = time.monotonic() + limits.seconds + 0.5  # for the sandbox itself to start
    found = bytearray()
    while True:
        if (left := end - time.monotonic()) <= 0:
            return "timeout", _text(found)
        if not select.select([child.stdout], [], [], left)[0]:
            continue
        piece = os.read(child.stdout.fileno(), 1 << 16)
        if not piece:
            break
        found += piece
        if len(found) > limits.output_bytes:
            return "too much output", _text(found[: limits.output_bytes])
    try:
        code = child.wait(max(end - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
        return "timeout", _text(found)
    return "answered" if code == 0 else "failed", _text(found)


def _text(data: bytes | bytearray) -> str:
    return data.decode("utf-8", "replace")
