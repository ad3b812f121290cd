"""Everything that differs between operating systems: locks, pipes, signals, memory, the processor's features.

Each function has a fallback, so that a system that lacks a facility loses only what depends on it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from dsv3_jax.errors import UserError

Notice = Literal["USR1", "USR2", "none"]
NOTICES = {name: number for name in ("USR1", "USR2") if (number := getattr(signal, f"SIG{name}", None)) is not None}
"""Signals by which a cluster announces the end of a job, by name."""

_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_TUNABLES = "GLIBC_TUNABLES"


def check_supported(system: str = sys.platform, machine: str | None = None) -> None:
    """Checks that there are versions of JAX and of the other packages for this operating system.

    Args:
      system: name of the system, as in `sys.platform`.
      machine: name of the processor; that of this machine if not given.

    Raises:
      UserError: there are none; the message says what to use instead.
    """
    if system in ("win32", "cygwin"):
        raise UserError("DSv3-JAX runs on Linux and macOS: on Windows, install WSL 2 (wsl --install) and use it there")
    if system == "darwin" and (machine or platform.machine()) == "x86_64":
        raise UserError(
            "JAX has no version for Macs with an Intel processor: use Linux there (Docker will do), or a Mac with an "
            "Apple processor and a Python made for it"
        )


def lock_exclusively(descriptor: int) -> None:
    """Locks an open file or folder against other processes, until it is closed.

    Raises:
      BlockingIOError: another process has locked it.
      OSError: the file system or the operating system has no such locks.
    """
    try:
        import fcntl
    except ImportError:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP)) from None
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def nonblocking_pipe() -> tuple[int, int]:
    """Returns the reading and the writing end of a pipe that never waits and that child processes do not get."""
    ends = os.pipe()
    for end in ends:
        os.set_blocking(end, False)
    return ends


def peak_memory_bytes() -> int:
    """Returns the largest amount of memory that this process has used, in bytes; 0 where that is not known."""
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def processor_flags() -> frozenset[str]:
    """Returns the names that Linux gives the processor's features, such as "avx512_bf16"; none on other systems."""
    return frozenset((_of_processor("flags", "Features") or "").split())


def processor_name() -> str:
    """Returns the name of the processor, or that of its architecture where the system does not name it."""
    return _of_processor("model name") or platform.machine()


def _of_processor(*names: str) -> str | None:
    """Returns the first value in Linux's description of the processor that has one of these names."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            pairs = [text.partition(":") for text in file]
    except OSError:
        return None
    return next((value.strip() for name, _, value in pairs if name.strip() in names), None)


def restart_with_huge_pages(setting: Path = _HUGE_PAGES) -> None:
    """Starts this program again, in the same process, with large arrays in huge pages; returns where it need not.

    A training step reads and writes hundreds of megabytes. Finding them in pages of 4 KiB took a CPU a quarter of the
    step (`experiments/benchmarks/huge_pages.py`). Linux gives huge pages to programs that ask for them, and glibc asks
    on behalf of Python and XLA if a variable of the environment says so when the program starts. Results do not depend
    on it.

    Args:
      setting: the file that says who gets huge pages.
    """
    tunables = os.environ.get(_TUNABLES, "")
    if sys.platform != "linux" or "glibc.malloc.hugetlb" in tunables:
        return
    with contextlib.suppress(OSError):  # no such file, or the system does not start the program again
        if "[madvise]" in setting.read_text(encoding="ascii"):
            tunables = ":".join(filter(None, (tunables, "glibc.malloc.hugetlb=1")))
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {_TUNABLES: tunables})


def call_before_abortion(function: Callable[[], None]) -> None:
    """Has `function` called where C++ code would abort the process; does nothing where that cannot be arranged."""
    _kept.append(ctypes.CFUNCTYPE(None)(function))
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libstdc++.so.6")["_ZSt13set_terminatePFvvE"](_kept[-1])


_kept: list[object] = []  # what C++ holds pointers to
