"""Loads a parameter from files to the devices that keep it, one piece of a file at a time.

A parameter has up to hundreds of gigabytes where layers and experts are stacked. Host memory holds it whole only if the
host's own memory is where it is kept. For a CPU device, pieces are read into the final buffer, which JAX adopts without
a copy. For an accelerator, each piece is copied to the device by itself, and a donated update writes it into the array
that is already there. Each host reads only the rows that its own devices need, and each of them once.
"""

from __future__ import annotations

import functools
import math
import mmap
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.interop.file_pieces import Box, Piece, pieces
from dsv3_jax.interop.nan_search import has_nan
from dsv3_jax.interop.stored_tensor import StoredTensor

PIECE_BYTES = 32 * 2**20
READERS = min(16, os.cpu_count() or 1)
_FRESH_PAGES = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


class Shard(Protocol):
    """A shard of a parameter while it is filled, from several threads."""

    def memory(self, target: Box) -> np.ndarray | None:
        """Returns the memory of a part of the shard if it may be filled directly, else None."""
        ...

    def write(self, values: np.ndarray, target: Box) -> None:
        """Writes values of any float dtype to a part of the shard, and returns when they are no longer needed."""
        ...

    def finish(self) -> list[jax.Array]:
        """Returns the shard on each of its devices."""
        ...


class HostShard:
    """A shard in host memory, which CPU devices adopt as it is; several devices share the same memory."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, devices: list[jax.Device]):
        self._buffer = fresh_pages(shape, dtype)
        self._devices = devices

    def memory(self, target: Box) -> np.ndarray | None:
        part = self._buffer[tuple(slice(*axis) for axis in target)]
        return part if part.flags.c_contiguous else None

    def write(self, values: np.ndarray, target: Box) -> None:
        part = self._buffer[tuple(slice(*axis) for axis in target)]
        part[...] = values.reshape(part.shape)

    def finish(self) -> list[jax.Array]:
        return [jax.device_put(self._buffer, device, may_alias=True) for device in self._devices]


class DeviceShard:
    """A shard on one or more accelerators, updated in place by donation."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, devices: list[jax.Device]):
        self._dtype = dtype
        self._devices = devices
        make = functools.partial(jnp.zeros, shape, dtype)
        self._arrays = [jax.jit(make, out_shardings=jax.sharding.SingleDeviceSharding(device))() for device in devices]
        self._lock = threading.Lock()

    def memory(self, target: Box) -> np.ndarray | None:
        return None

    def write(self, values: np.ndarray, target: Box) -> None:
        piece = values.astype(self._dtype, copy=False).reshape([last - first for first, last in target])
        starts = np.array([first for first, _ in target], np.int32)
        for index, device in enumerate(self._devices):
            on_device = jax.block_until_ready(jax.device_put(piece, device))
            with self._lock:
                self._arrays[index] = _update(self._arrays[index], on_device, starts)

    def finish(self) -> list[jax.Array]:
        return self._arrays


@functools.partial(jax.jit, donate_argnums=0)
def _update(array: jax.Array, piece: jax.Array, starts: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(array, piece, [starts[axis] for axis in range(array.ndim)])


def load_parameter(
    tensors: Iterable[StoredTensor],
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: jax.sharding.Sharding,
    readers: ThreadPoolExecutor,
    advance: Callable[[int], None],
    on_nan: Callable[[StoredTensor], None],
) -> jax.Array:
    """Returns one parameter, filled from its tensors.

    Args:
      tensors: the tensors that fill it, every element once.
      shape, dtype: of the whole parameter.
      sharding: which device keeps which shard. Rows that only other hosts' devices keep are not read.
      readers: the threads that read.
      advance: is called by the readers with the number of bytes that were read.
      on_nan: is called by the readers with each tensor that holds NaN, perhaps more than once.
    """
    shards = _make_shards(shape, dtype, sharding)

    def load(piece: Piece) -> None:
        if has_nan(_load(piece, shards)):
            on_nan(piece.tensor)
        advance(piece.nbytes)

    for _ in readers.map(load, pieces(tensors, shards, PIECE_BYTES)):
        pass  # raises what a reader raised
    return _assemble(shape, sharding, shards)


def _make_shards(shape: tuple[int, ...], dtype: np.dtype, sharding: jax.sharding.Sharding) -> dict[Box, Shard]:
    """Returns the different shards that this host's devices keep, filled with zeros."""
    devices: dict[Box, list[jax.Device]] = defaultdict(list)
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        devices[_box(index, shape)].append(device)
    return {
        box: (HostShard if held[0].platform == "cpu" else DeviceShard)(
            tuple(last - first for first, last in box), dtype, held
        )
        for box, held in devices.items()
    }


def _assemble(shape: tuple[int, ...], sharding: jax.sharding.Sharding, shards: Mapping[Box, Shard]) -> jax.Array:
    """Returns the array whose shards these are."""
    on_devices = {array.device: array for shard in shards.values() for array in shard.finish()}
    order = sharding.addressable_devices_indices_map(shape)
    return jax.make_array_from_single_device_arrays(shape, sharding, [on_devices[device] for device in order])


def _box(index: tuple[slice, ...] | None, shape: tuple[int, ...]) -> Box:
    slices = index or (slice(None),) * len(shape)
    return tuple(axis.indices(size)[:2] for axis, size in zip(slices, shape, strict=True))


def _load(piece: Piece, shards: Mapping[Box, Shard]) -> np.ndarray:
    """Reads a piece, writes it to its shards, and returns its values."""
    if len(piece.shards) == 1:
        memory = shards[piece.shards[0]].memory(piece.target(piece.shards[0]))
        if memory is not None and memory.size == piece.size:
            piece.tensor.read_into(piece.first, piece.last, memory)
            return memory
    values = piece.tensor.read(piece.first, piece.last)
    for box in piece.shards:
        shards[box].write(values[piece.columns(box)], piece.target(box))
    return values


def fresh_pages(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns an array of zeros in memory pages of its own, aligned as JAX requires of memory that it adopts.

    A page takes no memory before something is written to it. numpy would ask for huge pages, which virtual machines can
    take ten times as long to provide as to fill. Pages shared with other processes, which a mapping has unless told
    otherwise, take longer to provide too.
    """
    size = math.prod(shape)
    pages = mmap.mmap(-1, max(size * dtype.itemsize, 1), flags=_FRESH_PAGES)
    return np.frombuffer(pages, dtype, size).reshape(shape)
