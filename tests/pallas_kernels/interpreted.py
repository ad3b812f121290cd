"""Interpreters of Hopper and TPU kernels, which run them on the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.experimental.pallas.tpu as pltpu
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks  # the race detector's results have no public name
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pallas_kernels.hopper_launch import hopper_target


@contextlib.contextmanager
def interpreted_hopper(num_cores: int = 2) -> Iterator[plgpu.InterpretGPUParams]:
    """Yields the parameters that interpret a kernel and check every access to shared memory for races.

    It needs the settings of `tests/conftest.py` for callbacks: enough threads, and no asynchronous dispatch.

    Raises:
      RuntimeError: on leaving, when two accesses were not ordered by a barrier.
    """
    gpu_callbacks.reset_gpu_interpret_mode_state()
    try:
        with hopper_target(num_cores):
            yield plgpu.InterpretGPUParams(detect_races=True)
        if gpu_callbacks.get_races().races_found:
            raise RuntimeError("the kernel races: see the accesses printed above")
    finally:
        gpu_callbacks.reset_gpu_interpret_mode_state()


@contextlib.contextmanager
def interpreted_tpu() -> Iterator[pltpu.InterpretParams]:
    """Yields the parameters that interpret a kernel, and describes a TPU to the functions that choose kernels."""
    device = AbstractDevice(device_kind="TPU v6e", num_cores=1, platform="tpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        yield pltpu.InterpretParams()
