"""How the processes of a run agree: the first one decides from files, and tells the others.

All processes call these functions together. With one process they do nothing but call their argument.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

_LONGEST_MESSAGE = 1 << 16  # bytes


def is_first() -> bool:
    """Returns whether this is the process that prints and writes files for all."""
    return jax.process_index() == 0


def share[T](make: Callable[[], T]) -> T:
    """Calls `make` on the first process and returns its value on all of them.

    Args:
      make: returns a value that JSON can hold.

    Raises:
      UserError: on the first process, where `make` raised it.
      SystemExit: on the other processes, where `make` failed on the first one, which prints the reason.
    """
    if jax.process_count() == 1:
        return make()
    message: dict[str, Any] = {}
    problem: BaseException | None = None
    if is_first():
        try:
            message = {"value": make()}
        except BaseException as error:
            problem, message = error, {"problem": type(error).__name__}
    received = json.loads(_broadcast(json.dumps(message).encode()))
    if problem is not None:
        raise problem
    if "problem" in received:
        raise SystemExit(2)
    return received["value"]


def first_process_first[T](make: Callable[[], T]) -> T:
    """Calls `make` on the first process, and on the others when the first has returned, so that they find its files."""
    if jax.process_count() == 1:
        return make()
    made: list[T] = []
    share(lambda: made.append(make()))
    return made[0] if made else make()


def any_process(flag: bool) -> bool:
    """Returns whether `flag` is true on any process."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array([flag]))))


def gather(text: bytes) -> list[bytes]:
    """Returns what each process gave, in the order of the processes; the lengths may differ."""
    if jax.process_count() == 1:
        return [text]
    lengths = np.asarray(multihost_utils.process_allgather(np.array([len(text)], np.int32))).reshape(-1)
    padded = np.zeros(max(int(lengths.max()), 1), np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded)).astype(np.uint8).reshape(len(lengths), -1)
    return [row[:length].tobytes() for row, length in zip(rows, lengths, strict=True)]


def _broadcast(text: bytes) -> bytes:
    """Returns the bytes of the first process on all processes."""
    if len(text) > _LONGEST_MESSAGE:
        raise ValueError(f"a message of {len(text)} bytes is too long to send to the other processes")
    padded = np.zeros(_LONGEST_MESSAGE + 4, np.uint8)
    if is_first():
        padded[:4] = np.frombuffer(np.uint32(len(text)).tobytes(), np.uint8)
        padded[4 : 4 + len(text)] = np.frombuffer(text, np.uint8)
    received = np.asarray(multihost_utils.broadcast_one_to_all(padded)).astype(np.uint8)
    size = int(np.frombuffer(received[:4].tobytes(), np.uint32)[0])
    return received[4 : 4 + size].tobytes()
