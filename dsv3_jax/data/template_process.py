"""Renders an untrusted chat template in a process of its own, under limits of memory and time.

A Jinja sandbox keeps a template away from files and the interpreter, but not from filling the memory or from a loop
that takes years. This file is also the program of that process.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import threading
import time
import weakref
from datetime import datetime
from typing import IO, Any

from dsv3_jax.errors import UserError

MEMORY = 2**30  # bytes of address space
SECONDS = 30.0
LARGEST_TEXT = 64 * 2**20  # bytes of all texts of one answer


class TemplateProcess:
    """Renders one template for any number of conversations; may be called from several threads.

    The process is started by the first call, again by the next call after it was ended, and ends with this object.

    Args:
      template: the Jinja text.
      name: what messages call it.
      memory: largest address space of the process in bytes.
      seconds: longest time of one call.
    """

    def __init__(self, template: str, name: str, *, memory: int = MEMORY, seconds: float = SECONDS):
        self._template, self._name = template, name
        self._memory, self._seconds = memory, seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def render(self, variables: list[dict[str, Any]]) -> list[str]:
        """Returns the text of the template with each set of variables.

        Raises:
          UserError: jinja2 cannot read the template, the template fails or refuses the variables, or it is beyond the
            limits.
        """
        with self._lock:
            if self._process is None:
                self._start()
            answer = self._ask(variables)
        if "error" in answer:
            raise UserError(f"{self._name}: {answer['error']}")
        return answer["texts"]

    def _start(self) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-P", "-X", "utf8", __file__]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
            )
        except OSError as error:
            raise UserError(f"{self._name}: no process can be started to render it ({error.strerror})") from error
        self._end = weakref.finalize(self, _end, self._process)
        answer = self._ask({"template": self._template, "memory": self._memory})
        if "error" in answer:
            self._stop()
            raise UserError(f"{self._name}: {answer['error']}")

    def _ask(self, question: Any) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        problem = f"it takes more than {self._memory / 2**30:g} GiB of memory or {self._seconds:g} s"
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
            answer = _read_line(self._process.stdout, time.monotonic() + self._seconds)
        except OSError:
            answer = None
        if answer is None:
            self._stop()
            return {"error": problem}
        return json.loads(answer)

    def _stop(self) -> None:
        self._end()
        self._process = None


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):  # what was not yet written cannot be
                stream.close()


def _read_line(stream: IO[bytes], until: float) -> bytes | None:
    """Returns the next line of a pipe, or None if it ends, is too long, or the time is over."""
    parts: list[bytes] = []
    size = 0
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while size <= LARGEST_TEXT:
            if not selector.select(max(until - time.monotonic(), 0)):
                return None
            part = os.read(stream.fileno(), 2**16)
            if not part:
                return None
            parts.append(part)
            size += len(part)
            if part.endswith(b"\n"):
                return b"".join(parts)
    return None


def _environment() -> Any:
    """Returns a Jinja environment with the settings, filters and functions that transformers gives to templates."""
    import jinja2
    from jinja2 import ext, nodes, sandbox

    class Generation(ext.Extension):
        """The tag `generation`, with which some templates mark the assistant's turns; it prints its body."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    return environment


def _main() -> None:
    start = json.loads(sys.stdin.buffer.readline())
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (start["memory"], start["memory"]))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, ValueError, OSError):  # systems without such limits
        pass

    def answer(value: dict[str, Any]) -> None:
        sys.stdout.buffer.write(json.dumps(value).encode() + b"\n")
        sys.stdout.buffer.flush()

    def problem(error: Exception) -> dict[str, Any]:
        return {"error": " ".join(str(error).split())[:300] or type(error).__name__}

    try:
        template = _environment().from_string(start["template"])
    except MemoryError:
        raise
    except Exception as error:
        return answer(problem(error))
    answer({})
    for line in sys.stdin.buffer:
        try:
            answer({"texts": [template.render(**variables) for variables in json.loads(line)]})
        except MemoryError:
            raise
        except Exception as error:
            answer(problem(error))


if __name__ == "__main__":
    _main()
