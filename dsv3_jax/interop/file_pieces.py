"""Lists the rows of the published tensors that a host must read to fill the shards that its devices keep.

Nothing is read here, so that the bytes of a load can also be counted without the files
(`experiments/benchmarks/checkpoint_on_mesh.py`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Iterator

from dsv3_jax.interop.stored_tensor import StoredTensor

Box = tuple[tuple[int, int], ...]
"""A part of an array: the first index, and the last index + 1, along every axis."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """Consecutive rows of one tensor, and the shards that need them.

    Attributes:
      tensor: the tensor in its file.
      first, last: the range of rows, counted along the first axis of `tensor.published.tail`.
      shards: boxes of the parameter. Each takes all these rows, but perhaps not all columns.
    """

    tensor: StoredTensor
    first: int
    last: int
    shards: tuple[Box, ...]

    @property
    def size(self) -> int:
        """Number of weights in the rows, all columns included."""
        return (self.last - self.first) * math.prod(self.tensor.published.tail[1:])

    @property
    def nbytes(self) -> int:
        """Bytes that are read from the files: the tensor's bytes per row (scales included) times the rows."""
        return round(self.tensor.nbytes * (self.last - self.first) / self.tensor.published.tail[0])

    def columns(self, shard: Box) -> tuple[slice, ...]:
        """Returns the part of the rows [last - first, *tail[1:]] that a shard takes."""
        rest = shard[len(self.tensor.published.index) + 1 :]
        return (slice(None), *(slice(*axis) for axis in rest))

    def target(self, shard: Box) -> Box:
        """Returns the part of the shard that these rows fill, counted from the beginning of the shard."""
        index = self.tensor.published.index
        leading = tuple((at - first, at - first + 1) for at, (first, _) in zip(index, shard, strict=False))
        start = shard[len(index)][0]
        rest = tuple((0, last - first) for first, last in shard[len(index) + 1 :])
        return (*leading, (self.first - start, self.last - start), *rest)


def pieces(tensors: Iterable[StoredTensor], shards: Collection[Box], max_bytes: int) -> Iterator[Piece]:
    """Yields what must be read to fill `shards`. Rows that several shards need are read once.

    Args:
      tensors: the tensors that fill the parameter.
      shards: boxes of the parameter without overlap, as those of a `jax.sharding.Sharding` are.
      max_bytes: a piece has at most about that many bytes of a file. A tensor whose rotary rows are reordered is read
        whole for every shard.
    """
    for tensor in tensors:
        index = tensor.published.index
        by_rows: dict[tuple[int, int], list[Box]] = {}
        for shard in shards:
            if all(first <= at < last for at, (first, last) in zip(index, shard, strict=False)):
                by_rows.setdefault(shard[len(index)], []).append(shard)
        row_bytes = tensor.nbytes / tensor.published.tail[0]
        step = max(1, int(max_bytes / max(row_bytes, 1)))
        for (first, last), needing in by_rows.items():
            rows = last - first if tensor.rotary_width else step
            for begin in range(first, last, rows):
                yield Piece(tensor, begin, min(begin + rows, last), tuple(needing))
