"""How the Hopper grouped products are cut into tiles."""

from __future__ import annotations

import dataclasses

from pallas_kernels.hopper_launch import SHARED_MEMORY_BYTES

TILE_M = 128  # rows of a block's tile, 64 a consumer warpgroup
STAGE_BYTES = 128  # of the contraction in one stage: 128 values in FP8, 64 in bfloat16
PART = 64  # columns of the tile that leave together
WARPGROUPS = 2  # that multiply


@dataclasses.dataclass(frozen=True)
class Tiling:
    """One cut.

    Attributes:
      tile_n: columns of a block's tile.
      stages: pieces of the contraction in flight between the producer and the consumers.
      cluster: blocks, neighbours along the columns, that load each tile of the left operand once for all (TMA
        multicast). Neighbours along the rows may belong to two groups, so the right operand cannot be shared.
    """

    tile_n: int
    stages: int
    cluster: int = 1

    def __post_init__(self) -> None:
        if self.tile_n not in (64, 128, 256) or self.cluster not in (1, 2) or self.stages < 2:
            raise ValueError(f"{self} needs a tile_n of 64, 128 or 256, a cluster of 1 or 2 and 2 stages or more")

    def shared_memory_bytes(self, fp8: bool, out_bytes: int) -> int:
        stage = (TILE_M + self.tile_n) * STAGE_BYTES + (4 * self.tile_n if fp8 else 0)
        return self.stages * stage + WARPGROUPS * self.slots * 64 * PART * out_bytes + 2048

    def fits(self, fp8: bool, out_bytes: int) -> bool:
        return self.shared_memory_bytes(fp8, out_bytes) <= SHARED_MEMORY_BYTES

    @property
    def slots(self) -> int:
        """Buffers a warpgroup has for parts of the tile on their way out."""
        return min(2, self.tile_n // PART)


def candidates(fp8: bool, out_bytes: int) -> tuple[Tiling, ...]:
    """The tuning space, the default first. FP8 keeps two sets of sums in registers and so half the columns."""
    widths = (128, 64) if fp8 else (256, 128)
    cuts = []
    for cluster in (2, 1):
        for tile_n in widths:
            fitting = (Tiling(tile_n, stages, cluster) for stages in (6, 5, 4, 3))
            cuts.append(next(tiling for tiling in fitting if tiling.fits(fp8, out_bytes)))
    return tuple(cuts)


# Measured entries, (form and format, out columns, contraction, groups) to the fastest cut, are written here by
# `experiments/benchmarks/kernels.py --tune`.
TUNED: dict[tuple[str, int, int, int], Tiling] = {}


def choose_tiling(form: str, columns: int, contraction: int, groups: int, fp8: bool, out_bytes: int) -> Tiling:
    """A tuned entry, or the widest cut that the columns fill."""
    tuned = TUNED.get((f"{form} {'fp8' if fp8 else 'bf16'}", columns, contraction, groups))
    if tuned and tuned.fits(fp8, out_bytes):
        return tuned
    cuts = candidates(fp8, out_bytes)
    return next((cut for cut in cuts if cut.tile_n * cut.cluster <= columns), cuts[-1])
