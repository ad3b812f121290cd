"""What every Hopper kernel here shares: the target, the interpreter that stands in for it, the shapes TMA asks for."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, get_abstract_mesh, use_abstract_mesh
from jax.typing import DTypeLike
from jaxtyping import Array

H200_MULTIPROCESSORS = 132
SHARED_MEMORY_BYTES = 232_448  # the most one block can have on compute capability 9.0


def multiprocessors() -> int:
    """How many the target has: a persistent grid is one block (or cluster) for each."""
    abstract = getattr(get_abstract_mesh(), "abstract_device", None)
    if abstract is not None and abstract.num_cores:
        return abstract.num_cores
    return getattr(jax.devices()[0], "core_count", None) or H200_MULTIPROCESSORS


@contextlib.contextmanager
def hopper_target(num_cores: int = H200_MULTIPROCESSORS) -> Iterator[None]:
    """Traces what is inside for an H200 (of `num_cores` multiprocessors) whatever this machine has."""
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=num_cores, platform="gpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        yield


@contextlib.contextmanager
def interpreted_hopper(num_cores: int = 2) -> Iterator[plgpu.InterpretGPUParams]:
    """Parameters that run a kernel on the CPU with every shared-memory access checked for races.

    Raises:
      RuntimeError: on leaving, when two accesses were not ordered by a barrier.
    """
    # Where JAX keeps what the race detector found; it has no public name.
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    gpu_callbacks.reset_gpu_interpret_mode_state()
    try:
        with hopper_target(num_cores):
            yield plgpu.InterpretGPUParams(detect_races=True)
        if gpu_callbacks.get_races().races_found:
            raise RuntimeError("the kernel races: see the accesses printed above")
    finally:
        gpu_callbacks.reset_gpu_interpret_mode_state()


def swizzled(width: int, dtype: DTypeLike, extent: int) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
    """Layout of a shared-memory tile that wgmma and TMA touch without two accesses to one bank.

    The wider the swizzle the better, up to 128 bytes; it must divide the tile's `width` and the `extent` of the array
    that the tile is cut from, in columns of `dtype`.
    """
    columns = math.gcd(width, extent)
    swizzle = plgpu.find_swizzle(columns * jnp.dtype(dtype).itemsize * 8)
    tiling = (8, swizzle // jnp.dtype(dtype).itemsize)
    return plgpu.TilingTransform(tiling), plgpu.SwizzleTransform(swizzle)  # pyright: ignore[reportAbstractUsage]


def pad_to(x: Array, *multiples: int) -> Array:
    """`x` with zeros after its last axes, up to a multiple each. TMA moves whole swizzled tiles of 8 rows."""
    excess = [-size % multiple for size, multiple in zip(x.shape[-len(multiples) :], multiples, strict=True)]
    if not any(excess):
        return x
    return jnp.pad(x, [(0, 0)] * (x.ndim - len(multiples)) + [(0, e) for e in excess])
