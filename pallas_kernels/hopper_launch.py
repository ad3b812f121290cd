"""Parts that all Hopper kernels share: a description of the target, and the layouts and shapes that TMA needs."""

from __future__ import annotations

import contextlib
import math

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.sharding import get_abstract_mesh
from jax.typing import DTypeLike
from jaxtyping import Array

from pallas_kernels.device import described_target

H200_MULTIPROCESSORS = 132
SHARED_MEMORY_BYTES = 232_448  # of one block, at most, on compute capability 9.0


def multiprocessors() -> int:
    """Returns the number of multiprocessors of the target: a persistent grid has one block (or cluster) for each."""
    abstract = getattr(get_abstract_mesh(), "abstract_device", None)
    if abstract is not None and abstract.num_cores:
        return abstract.num_cores
    return getattr(jax.devices()[0], "core_count", None) or H200_MULTIPROCESSORS


def hopper_target(num_cores: int = H200_MULTIPROCESSORS) -> contextlib.AbstractContextManager[None]:
    """Returns a context that traces programs for an H200 with `num_cores` multiprocessors."""
    return described_target("NVIDIA H200", "gpu", num_cores)


def swizzled(width: int, dtype: DTypeLike, extent: int) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
    """Returns the layout of a shared-memory tile that wgmma and TMA access without bank conflicts.

    The wider the swizzle the better, up to 128 bytes; it must divide the tile's `width` and the `extent` of the array
    that the tile is cut from, in columns of `dtype`.
    """
    columns = math.gcd(width, extent)
    swizzle = plgpu.find_swizzle(columns * jnp.dtype(dtype).itemsize * 8)
    tiling = (8, swizzle // jnp.dtype(dtype).itemsize)
    return plgpu.TilingTransform(tiling), plgpu.SwizzleTransform(swizzle)  # pyright: ignore[reportAbstractUsage]


def pad_to(x: Array, *multiples: int) -> Array:
    """Returns `x` with its last axes padded with zeros to `multiples`. TMA copies whole swizzled tiles of 8 rows."""
    excess = [-size % multiple for size, multiple in zip(x.shape[-len(multiples) :], multiples, strict=True)]
    if not any(excess):
        return x
    return jnp.pad(x, [(0, 0)] * (x.ndim - len(multiples)) + [(0, e) for e in excess])
