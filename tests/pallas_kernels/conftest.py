"""Public functions on an accelerator's kernels, run by its interpreter."""

from __future__ import annotations

import contextlib
import functools

import jax.experimental.pallas.tpu as pltpu
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pallas_kernels.hopper_launch import interpreted_hopper


@contextlib.contextmanager
def _interpreted_tpu():
    device = AbstractDevice(device_kind="TPU v6e", num_cores=1, platform="tpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        yield pltpu.InterpretParams()


@pytest.fixture
def on_device(monkeypatch):
    """on_device("hopper" or "tpu", module of its kernels, names of them): where public functions choose those kernels.

    On Hopper every access to shared memory is checked for races.
    """

    @contextlib.contextmanager
    def interpreted(device: str, kernels, *names: str):
        with (
            interpreted_hopper() if device == "hopper" else _interpreted_tpu() as interpret,
            monkeypatch.context() as patch,
        ):
            for name in names:
                patch.setattr(kernels, name, functools.partial(getattr(kernels, name), interpret=interpret))
            yield

    return interpreted
