"""Tilings of the Hopper product, and the one that a problem gets."""

from __future__ import annotations

import dataclasses
import math

from pallas_kernels.hopper_launch import SHARED_MEMORY_BYTES
from pallas_kernels.quantize.quantized import PROMOTION_INTERVAL, TILE

WARPGROUP_ROWS = 64  # rows of a tile that one warpgroup multiplies: M of a wgmma
TILE_M = 2 * WARPGROUP_ROWS  # rows of a block's tile: two consumer warpgroups


@dataclasses.dataclass(frozen=True)
class Tiling:
    """One way to cut the product into tiles.

    Attributes:
      tile_m: rows of a block's tile; two consumer warpgroups share them.
      tile_n: columns of a block's tile, a multiple of 64.
      stages: steps of 128 of K for which the ring between producer and consumers has buffers.
      cluster: how many blocks, neighbours along M, share each tile of B, which is loaded once (TMA multicast).
      raster_width: width along N of the snake in which tiles are visited, for reuse in L2.
    """

    tile_m: int = TILE_M
    tile_n: int = 128
    stages: int = 4
    cluster: int = 1
    raster_width: int = 8

    def __post_init__(self) -> None:
        if self.tile_m != TILE_M:
            raise ValueError(
                f"tile_m must be {TILE_M} ({WARPGROUP_ROWS} rows per consumer warpgroup), not {self.tile_m}"
            )
        if self.tile_n not in (64, 128, 192):
            raise ValueError(f"tile_n must be 64, 128 or 192 (accumulators live in registers), not {self.tile_n}")
        if self.cluster not in (1, 2) or self.stages < 2 or self.raster_width < 1:
            raise ValueError(f"{self} needs a cluster of 1 or 2, 2 stages or more and a positive raster width")

    @property
    def scale_columns(self) -> int:
        """The widest part of a tile whose columns always share one scale of a 128x128 block."""
        return math.gcd(self.tile_n, TILE)

    def shared_memory_bytes(self, out_bytes: int) -> int:
        a_stage = self.tile_m * (PROMOTION_INTERVAL + 4)
        b_stage = self.tile_n * (PROMOTION_INTERVAL + 4)
        return self.stages * (a_stage + b_stage) + self.tile_m * self.tile_n * out_bytes + 2048

    def fits(self, out_bytes: int) -> bool:
        return self.shared_memory_bytes(out_bytes) <= SHARED_MEMORY_BYTES


# Measured entries, (M, N, K) to the fastest tiling, are written here by `experiments/benchmarks/kernels.py --tune`.
TUNED: dict[tuple[int, int, int], Tiling] = {}


def choose_tiling(m: int, n: int, k: int, out_bytes: int, by_column: bool, multiprocessors: int) -> Tiling:
    """Returns the tuned entry, or the tiling with the fewest estimated cycles. `by_column`: as for `candidates`."""
    space = candidates(out_bytes, by_column)
    if (tuned := TUNED.get((m, n, k))) and tuned.fits(out_bytes) and tuned.tile_n <= max(c.tile_n for c in space):
        return tuned
    return min(space, key=lambda tiling: sum(estimated_cycles(tiling, m, n, k, multiprocessors).values()))


# Bytes per cycle that one multiprocessor gets from L2 when all read: what published kernels' rates imply.
L2_BYTES_PER_CYCLE = 33
EPILOGUE_CYCLES = 1500  # to write a tile, during which the same warpgroup multiplies nothing


def estimated_cycles(tiling: Tiling, m: int, n: int, k: int, multiprocessors: int) -> dict[str, float]:
    """Returns the cycles of the busiest multiprocessor, in its main loop and in its epilogues.

    The main loop's key is the resource that is busy longest in a step of 128 of K:

    tensor cores    4,096 multiply-adds per cycle
    L2              the step's tiles of A and B, B's shared by the cluster
    one warpgroup   its wgmma alone (the other's fill the gaps only if they can), about 100 cycles of waiting, and the
                    promotion: per warp tile_n / 2 fused multiply-adds and as many zeros for the next accumulator
    """
    step = {
        "tensor cores": tiling.tile_m * tiling.tile_n * PROMOTION_INTERVAL / 4096,
        "L2": PROMOTION_INTERVAL * (tiling.tile_m + tiling.tile_n / tiling.cluster) / L2_BYTES_PER_CYCLE,
        "one warpgroup": tiling.tile_m * tiling.tile_n * PROMOTION_INTERVAL / 4096 / 2 + tiling.tile_n + 140,
    }
    bound = max(step, key=step.__getitem__)
    clusters = -(-m // (tiling.tile_m * tiling.cluster)) * -(-n // tiling.tile_n)
    rounds = -(-clusters // (multiprocessors // tiling.cluster))
    return {bound: rounds * -(-k // PROMOTION_INTERVAL) * step[bound], "epilogues": rounds * EPILOGUE_CYCLES}


def candidates(out_bytes: int, by_column: bool) -> tuple[Tiling, ...]:
    """Returns the tuning space: what `--tune` times and what is compiled ahead.

    Args:
      by_column: B has a scale per column (a weight gradient). A warpgroup has them in registers beside both sums, which
        leaves no room for 192 columns.
    """
    all_of = (
        Tiling(tile_n=tile_n, stages=stages, cluster=cluster)
        for tile_n, cluster in ((192, 2), (192, 1), (128, 2), (128, 1), (64, 1))
        if not (by_column and tile_n > 128)
        for stages in (6, 5, 4, 3)
    )
    best: dict[tuple[int, int], Tiling] = {}
    for tiling in all_of:
        if tiling.fits(out_bytes):
            best.setdefault((tiling.tile_n, tiling.cluster), tiling)
    return tuple(best.values())
