"""From files onto devices, piece by piece.

A parameter (up to hundreds of gigabytes when layers and experts are stacked) is never whole in host memory unless the
host is where it stays. On a CPU device, pieces are read into the final buffer itself, which JAX then adopts without a
copy. On an accelerator, each piece goes up on its own and a donated update puts it into the array that is already
there. With several devices each host reads only the rows that its own devices hold.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import mmap
import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.interop.fp8_weights import dequantise, dequantise_into
from dsv3_jax.interop.nan_search import has_nan
from dsv3_jax.interop.safetensors_reader import DTYPES, TensorEntry
from dsv3_jax.interop.tensor_names import BLOCK, Slot

Region = tuple[tuple[int, int], ...]  # first and last + 1 along every axis
_PIECE_BYTES = 128 * 2**20
_FRESH_PAGES = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
READERS = min(16, os.cpu_count() or 1)


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, for a slot of the model.

    Attributes:
      slot: its place in the model.
      entry: its place in the file.
      scale: the scales of an FP8 tensor.
      rotary_width: number of rotary rows at the end of each head to be moved from halves to pairs; 0 for none.
    """

    slot: Slot
    entry: TensorEntry
    scale: TensorEntry | None = None
    rotary_width: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes in the files, scales included."""
        return self.entry.nbytes + (self.scale.nbytes if self.scale else 0)

    @property
    def scales(self) -> StoredTensor:
        """The scales as a tensor of their own, in the same place of an array of scales."""
        assert self.scale is not None
        shape = self.slot.scale_shape
        return StoredTensor(dataclasses.replace(self.slot, shape=shape, tail=shape), self.scale)

    def read_rows(self, first: int, last: int) -> np.ndarray:
        """Rows of the published tensor, dequantised to float32 if FP8, rotary rows in pairs."""
        if self.rotary_width:
            heads = self._plain_rows(0, self.slot.shape[0])
            return _halves_to_pairs(heads, self.slot.rotary_head, self.rotary_width)[first:last]
        return self._plain_rows(first, last)

    def dequantise_rows_into(self, first: int, last: int, target: np.ndarray) -> None:
        """Rows of an FP8 tensor, `first` being a multiple of 128, into `target` of any float dtype."""
        assert self.scale is not None
        scales = self.scale.read_rows(first // BLOCK, -(-last // BLOCK)).astype(np.float32)
        dequantise_into(self.entry.read_rows(first, last), scales, target)

    def _plain_rows(self, first: int, last: int) -> np.ndarray:
        if self.scale is None:
            return self.entry.read_rows(first, last)
        start, stop = first - first % BLOCK, min(-(-last // BLOCK) * BLOCK, self.slot.shape[0])
        scales = self.scale.read_rows(start // BLOCK, -(-stop // BLOCK)).astype(np.float32)
        return dequantise(self.entry.read_rows(start, stop), scales)[first - start : last - start]


@dataclasses.dataclass(frozen=True)
class Piece:
    """A piece that was read.

    Attributes:
      values: its numbers, on the host.
      put: puts it where it belongs; called in the thread that called `load_parameter`.
    """

    values: np.ndarray
    put: Callable[[], None] = lambda: None


class Destination(Protocol):
    """Where the pieces of one region of a parameter go."""

    def read(self, tensor: StoredTensor, part: Region, place: Region) -> Piece:
        """Reads `part` of the slot's tail (in any thread) for `place`."""
        ...

    def finish(self) -> list[jax.Array]:
        """The region on each of its devices."""
        ...


class HostDestination:
    """The final buffer, in host memory; CPU devices adopt it as it is."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, devices: list[jax.Device]):
        self._buffer = _empty_pages(shape, dtype)
        self._devices = devices

    def read(self, tensor: StoredTensor, part: Region, place: Region) -> Piece:
        target = self._buffer[tuple(slice(*axis) for axis in place)]
        target = target.reshape([last - first for first, last in part], copy=False)
        unit = tensor.slot.shape[0] // tensor.slot.tail[0]
        first, last = part[0][0] * unit, part[0][1] * unit
        whole_rows = all(axis == (0, size) for axis, size in zip(part[1:], tensor.slot.tail[1:], strict=True))
        direct = whole_rows and target.flags.c_contiguous and not tensor.rotary_width
        if direct and tensor.scale is None and DTYPES[tensor.entry.dtype] == target.dtype:
            tensor.entry.read_rows_into(first, last, target)
        elif direct and tensor.scale is not None and first % BLOCK == 0:
            tensor.dequantise_rows_into(first, last, target.reshape(last - first, -1))
        else:
            target[...] = read_part(tensor, part)
        return Piece(target)

    def finish(self) -> list[jax.Array]:
        return [jax.device_put(self._buffer, device, may_alias=True) for device in self._devices]


class DeviceDestination:
    """An array on each device, updated in place by donation."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, devices: list[jax.Device]):
        self._dtype = dtype
        self._devices = devices
        make = functools.partial(jnp.zeros, shape, dtype)
        self._arrays = [jax.jit(make, out_shardings=jax.sharding.SingleDeviceSharding(device))() for device in devices]

    def read(self, tensor: StoredTensor, part: Region, place: Region) -> Piece:
        piece = read_part(tensor, part).astype(self._dtype, copy=False)
        piece = piece.reshape([last - first for first, last in place])
        starts = np.array([first for first, _ in place], np.int32)

        def put() -> None:
            for index, device in enumerate(self._devices):
                on_device = jax.device_put(piece, device)
                self._arrays[index] = _update(self._arrays[index], on_device, starts)

        return Piece(piece, put)

    def finish(self) -> list[jax.Array]:
        return self._arrays


@functools.partial(jax.jit, donate_argnums=0)
def _update(array: jax.Array, piece: jax.Array, starts: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(array, piece, [starts[axis] for axis in range(array.ndim)])


def read_part(tensor: StoredTensor, part: Region) -> np.ndarray:
    """`part` of the slot's tail: only the rows it needs are read."""
    tail = tensor.slot.tail
    unit = tensor.slot.shape[0] // tail[0]
    (first, last), rest = part[0], part[1:]
    rows = tensor.read_rows(first * unit, last * unit).reshape(last - first, *tail[1:])
    return rows[(slice(None), *(slice(*axis) for axis in rest))]


def load_parameter(
    tensors: Iterable[StoredTensor],
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: jax.sharding.Sharding,
    readers: ThreadPoolExecutor,
    advance: Callable[[int], None],
    on_nan: Callable[[StoredTensor], None] = lambda tensor: None,
    *,
    destination: type[HostDestination] | type[DeviceDestination] | None = None,
) -> jax.Array:
    """One parameter, filled from its tensors.

    Args:
      tensors: what fills it, every place once.
      shape, dtype: of the whole parameter.
      sharding: where its parts go; parts of other hosts' devices are not read.
      readers: threads that read.
      advance: told the bytes read.
      on_nan: told of tensors that hold NaN, perhaps more than once; from any thread.
      destination: how a region is assembled; by the kind of device unless given.
    """
    tensors = list(tensors)
    parts: dict[jax.Device, jax.Array] = {}
    for region, devices in _regions(shape, sharding).items():
        kind = destination or (HostDestination if devices[0].platform == "cpu" else DeviceDestination)
        target = kind(tuple(last - first for first, last in region), dtype, devices)
        _run(_pieces(tensors, region, target, advance, on_nan), readers)
        parts |= dict(zip(devices, target.finish(), strict=True))
    order = sharding.addressable_devices_indices_map(shape)
    return jax.make_array_from_single_device_arrays(shape, sharding, [parts[device] for device in order])


def _regions(shape: tuple[int, ...], sharding: jax.sharding.Sharding) -> dict[Region, list[jax.Device]]:
    """Distinct parts of an array that this host's devices hold, and who holds each."""
    regions: dict[Region, list[jax.Device]] = defaultdict(list)
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        slices = index or (slice(None),) * len(shape)
        region = tuple(axis.indices(size)[:2] for axis, size in zip(slices, shape, strict=True))
        regions[region].append(device)
    return regions


def _pieces(
    tensors: list[StoredTensor],
    region: Region,
    target: Destination,
    advance: Callable[[int], None],
    on_nan: Callable[[StoredTensor], None],
) -> Iterator[Callable[[], Callable[[], None]]]:
    """Work for the readers: each call reads a piece of at most about 128 MiB and returns how to put it."""
    for tensor in tensors:
        lead, tail = region[: len(tensor.slot.index)], region[len(tensor.slot.index) :]
        inside = zip(tensor.slot.index, lead, strict=True)
        if not all(first <= at < last for at, (first, last) in inside):
            continue
        here = tuple((at - first, at - first + 1) for at, (first, _) in zip(tensor.slot.index, lead, strict=True))
        (first, last), rest = tail[0], tail[1:]
        row_bytes = tensor.nbytes / tensor.slot.tail[0]
        step = max(1, int(_PIECE_BYTES / max(row_bytes, 1)))
        if tensor.rotary_width:
            step = last - first  # rows move within the whole tensor
        for begin in range(first, last, step):
            end = min(begin + step, last)
            place = (*here, (begin - first, end - first), *((0, b - a) for a, b in rest))
            yield functools.partial(_read, target, tensor, ((begin, end), *rest), place, advance, on_nan)


def _read(
    target: Destination,
    tensor: StoredTensor,
    part: Region,
    place: Region,
    advance: Callable[[int], None],
    on_nan: Callable[[StoredTensor], None],
) -> Callable[[], None]:
    piece = target.read(tensor, part, place)
    if has_nan(piece.values):
        on_nan(tensor)
    share = math.prod(last - first for first, last in part) / max(tensor.entry.size, 1)
    advance(round(tensor.nbytes * share))
    return piece.put


def _run(work: Iterable[Callable[[], Callable[[], None]]], readers: ThreadPoolExecutor) -> None:
    """Reads ahead by a few pieces, puts in order; at most so many pieces are in memory."""
    waiting: deque[Future[Callable[[], None]]] = deque()
    try:
        for read in work:
            waiting.append(readers.submit(read))
            if len(waiting) > READERS:
                waiting.popleft().result()()
        while waiting:
            waiting.popleft().result()()
    finally:
        for future in waiting:
            future.cancel()


def _halves_to_pairs(matrix: np.ndarray, head: int, rotary: int) -> np.ndarray:
    """Moves rows (i, i + rotary/2) of each head's rotary part to (2i, 2i + 1)."""
    heads = matrix.reshape(-1, head, matrix.shape[-1])
    halves = heads[:, head - rotary :].reshape(heads.shape[0], 2, rotary // 2, -1)
    pairs = halves.swapaxes(1, 2).reshape(heads.shape[0], rotary, -1)
    return np.concatenate([heads[:, : head - rotary], pairs], axis=1).reshape(matrix.shape)


def _empty_pages(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array in fresh pages of its own, aligned as JAX wants memory that it adopts.

    numpy would ask for huge pages, which virtual machines can take ten times as long to provide as to fill. Pages
    shared with other processes, which a mapping has unless told otherwise, are slower to come by.
    """
    size = math.prod(shape)
    pages = mmap.mmap(-1, max(size * dtype.itemsize, 1), flags=_FRESH_PAGES)
    return np.frombuffer(pages, dtype, size).reshape(shape)
