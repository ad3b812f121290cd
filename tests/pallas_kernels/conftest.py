"""Lets public functions run an accelerator's kernels in their interpreter."""

from __future__ import annotations

import contextlib
import functools

import pytest
from interpreted import interpreted_hopper, interpreted_tpu


@pytest.fixture
def on_device(monkeypatch):
    """Returns on_device(device, module of its kernels, names of them), inside which public functions run those kernels.

    `device` is "hopper", where every access to shared memory is checked for races, or "tpu".
    """

    @contextlib.contextmanager
    def interpreted(device: str, kernels, *names: str):
        with (
            interpreted_hopper() if device == "hopper" else interpreted_tpu() as interpret,
            monkeypatch.context() as patch,
        ):
            for name in names:
                patch.setattr(kernels, name, functools.partial(getattr(kernels, name), interpret=interpret))
            yield

    return interpreted
