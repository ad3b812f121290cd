"""The part of every batch that a process reads, as arrays over all devices (report section 3.2)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Int

from dsv3_jax.sharding.rules import BATCH_AXES, batch_spec


@dataclasses.dataclass(frozen=True)
class BatchFeed:
    """A process's shard of every batch: number `index` of `count`, with the rows of the batch ranks `ranks`.

    Processes whose devices have the same batch ranks, because a tensor or stage axis separates them, read the same
    shard.

    Attributes:
      mesh: the devices; None for one device.
    """

    mesh: Mesh | None
    index: int
    count: int
    ranks: tuple[int, ...]

    @classmethod
    def of(cls, mesh: Mesh | None) -> BatchFeed:
        """Returns the feed of this process for a mesh, or for one device."""
        if mesh is None:
            return cls(None, 0, 1, (0,))
        sets: dict[int, set[int]] = {}
        for coordinates, device in np.ndenumerate(mesh.devices):
            sizes = [mesh.shape[axis] for axis in BATCH_AXES]
            at = [coordinates[mesh.axis_names.index(axis)] for axis in BATCH_AXES]
            sets.setdefault(device.process_index, set()).add(int(np.ravel_multi_index(at, sizes)))
        parts = sorted({tuple(sorted(ranks)) for ranks in sets.values()})
        total = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
        apart = sum(map(len, parts)) == total and len({len(part) for part in parts}) == 1
        if not apart:  # some processes share only a part of their rows: every process reads all rows
            parts = [tuple(range(total))]
        mine = tuple(sorted(sets[jax.process_index()])) if apart else parts[0]
        return cls(mesh, parts.index(mine), len(parts), mine)

    def put(self, rows: Int[np.ndarray, "A b T1"], pass_axis: bool = True) -> Any:
        """Returns the batch as one array over all devices, of which this process provides its rows.

        Args:
          rows: [passes, rows of this process per pass, T+1]; without `pass_axis` there is no first axis.
        """
        if self.mesh is None:
            return rows
        axis = int(pass_axis)
        each = rows.shape[axis] // len(self.ranks)
        position = {rank: index for index, rank in enumerate(self.ranks)}
        shape = (*rows.shape[:axis], each * len(self.ranks) * self.count, *rows.shape[axis + 1 :])

        def part(index: Any) -> np.ndarray:
            first = position[(index[axis].start or 0) // each] * each
            own = slice(first, first + each)
            return rows[:, own] if pass_axis else rows[own]

        sharding = NamedSharding(self.mesh, batch_spec(leading=axis))
        return jax.make_array_from_callback(shape, sharding, part)

    def put_from_whole(self, rows: Int[np.ndarray, "*A B T1"], pass_axis: bool = False) -> Any:
        """Returns a batch as one array over all devices, where every process has all of its rows.

        Args:
          rows: [rows, T+1]; with `pass_axis`, [passes, rows of a pass, ...].
        """
        if self.mesh is None:
            return rows
        sharding = NamedSharding(self.mesh, batch_spec(leading=int(pass_axis)))
        return jax.make_array_from_callback(rows.shape, sharding, lambda index: rows[index])
