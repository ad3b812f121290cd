"""Cases that go wrong in every way that a check on a GPU may, between cases that pass."""

import os
import signal
import time
from collections.abc import Iterator

import numpy as np
from cases import Case, note


def cases(tiny: bool) -> Iterator[Case]:
    yield Case("first", _pass)
    yield Case("hang", _hang)
    yield Case("after the hang", _pass)
    yield Case("crash", os.abort)
    yield Case("out of memory", lambda: {"passed": bool(np.ones(1 << 55).any())})
    yield Case("killed", lambda: os.kill(os.getpid(), signal.SIGKILL) or {})
    yield Case("wrong", lambda: {"passed": False, "error": 0.5, "tolerance": 0.1})
    yield Case("not a number", lambda: {"passed": True, "error": float("nan"), "tolerance": 0.1})
    yield Case("last", _pass)


def _hang() -> dict:
    note(compile_s=1.5)
    time.sleep(1000)
    return {}


def _pass() -> dict:
    return {"passed": True, "error": 0.0, "tolerance": 0.1}
