"""Tilings of the Hopper product, the estimate of their cycles, and the tiling that a problem gets."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Literal

from pallas_kernels.hopper_launch import SHARED_MEMORY_BYTES
from pallas_kernels.quantize.quantized import PROMOTION_INTERVAL, TILE

WARPGROUP_ROWS = 64  # rows of a tile that one warpgroup multiplies at a time: M of a wgmma
TILE_M = 2 * WARPGROUP_ROWS  # rows of a block's tile with two consumer warpgroups and one wave each
_MOST_STAGES = 12
# Columns of a tile for which no register spills. A thread of a consumer has its totals and one accumulator in at most
# 192 of its 232 registers: with two waves up to 128 columns. A width of 176 would have 11 block scales beside them.
_WIDTHS = (192, 160, 144, 128, 112, 96, 80, 64, 48, 32, 16)


@dataclasses.dataclass(frozen=True)
class Tiling:
    """One way to cut the product into tiles.

    Attributes:
      tile_m: rows of a block's tile: 64 for one consumer warpgroup, 128 for two, 256 for two with two waves of 64 rows
        each, one after the other.
      tile_n: columns of a block's tile, a multiple of 16.
      stages: steps of 128 of K for which the ring between producer and consumers has buffers.
      cluster: how many blocks share tiles of one operand, which are loaded once (TMA multicast).
      shared: that operand: "b" for neighbours along M, "a" for neighbours along N.
      splits: parts of K that different blocks sum; their float32 sums are added by a second kernel.
      raster_width: width along N of the snake in which tiles are visited, for reuse in L2.
    """

    tile_m: int = TILE_M
    tile_n: int = 128
    stages: int = 4
    cluster: int = 1
    shared: Literal["a", "b"] = "b"
    splits: int = 1
    raster_width: int = 8

    def __post_init__(self) -> None:
        if self.tile_m not in (WARPGROUP_ROWS, TILE_M, 2 * TILE_M):
            raise ValueError(f"tile_m must be 64, 128 or 256 (64 rows per consumer and wave), not {self.tile_m}")
        if self.tile_n % 16 or not 0 < self.tile_n * self.waves <= 256:
            raise ValueError(
                f"tile_n must be a multiple of 16 up to {256 // self.waves} with {self.tile_m} rows "
                f"(sums live in registers), not {self.tile_n}"
            )
        if self.cluster not in (1, 2) or self.stages < 2 or self.splits < 1 or self.raster_width < 1:
            raise ValueError(f"{self} needs a cluster of 1 or 2, 2 stages or more, 1 split or more, a raster width")

    @property
    def consumers(self) -> int:
        return min(self.tile_m // WARPGROUP_ROWS, 2)

    @property
    def waves(self) -> int:
        """How many times 64 rows a consumer multiplies in each step."""
        return self.tile_m // WARPGROUP_ROWS // self.consumers

    @property
    def cluster_m(self) -> int:
        return self.cluster if self.shared == "b" else 1

    @property
    def cluster_n(self) -> int:
        return self.cluster if self.shared == "a" else 1

    @property
    def scale_columns(self) -> int:
        """The widest part of a tile whose columns always share one scale of a 128x128 block."""
        return math.gcd(self.tile_n, TILE)

    def shared_memory_bytes(self, out_bytes: int) -> int:
        scales = self.tile_m + self.tile_n + -self.tile_n % 32  # those of the columns padded to 128 bytes
        stage = (self.tile_m + self.tile_n) * PROMOTION_INTERVAL + 4 * scales
        return self.stages * stage + self.consumers * WARPGROUP_ROWS * self.tile_n * out_bytes + 1024

    def fits(self, out_bytes: int) -> bool:
        return self.shared_memory_bytes(out_bytes) <= SHARED_MEMORY_BYTES

    def words(self) -> str:
        cluster = f", cluster {self.cluster} sharing {self.shared}" if self.cluster > 1 else ""
        splits = f", K in {self.splits} parts" if self.splits > 1 else ""
        return f"{self.tile_m} x {self.tile_n}, {self.stages} stages{cluster}{splits}"


# (M, N, K) to the fastest tiling, as measured by `experiments/device/run.py timing`.
TUNED: dict[tuple[int, int, int], Tiling] = {}


def choose_tiling(m: int, n: int, k: int, out_bytes: int, by_column: bool, multiprocessors: int) -> Tiling:
    """Returns the tuned entry, or the tiling with the fewest estimated cycles. Arguments as for `candidates`."""
    tuned = TUNED.get((m, n, k))
    if tuned and tuned.fits(out_bytes) and tuned in tilings(out_bytes, by_column):
        return tuned
    return candidates(m, n, k, out_bytes, by_column, multiprocessors)[0]


@functools.lru_cache
def candidates(
    m: int, n: int, k: int, out_bytes: int, by_column: bool, multiprocessors: int, most: int = 8
) -> tuple[Tiling, ...]:
    """Returns the `most` tilings with the fewest estimated cycles, fewest first.

    Args:
      by_column: B has a scale per column and the product is added to an accumulator (a weight gradient).
    """

    def cycles(tiling: Tiling) -> tuple[float, float]:
        estimate = estimated_cycles(tiling, m, n, k, out_bytes, by_column, multiprocessors)
        # Among equals the one that uses the resources which do not bound it least.
        return sum(estimate.values()), sum(step_cycles(tiling, m, by_column).values())

    return tuple(sorted(tilings(out_bytes, by_column), key=cycles)[:most])


@functools.lru_cache
def tilings(out_bytes: int, by_column: bool) -> tuple[Tiling, ...]:
    """Returns all tilings that do not spill, each with as many stages as fit.

    With a scale per column a warpgroup has these in registers beside both sums: its tiles are 128 x 128 at most.
    """
    result: list[Tiling] = []
    shares: tuple[tuple[int, Literal["a", "b"]], ...] = ((1, "b"), (2, "b"), (2, "a"))
    for tile_m in (2 * TILE_M, TILE_M, WARPGROUP_ROWS):
        if by_column and tile_m > TILE_M:
            continue
        for tile_n in _WIDTHS:
            if tile_n > (TILE if by_column or tile_m > TILE_M else _WIDTHS[0]):
                continue
            for cluster, shared in shares:
                for splits in (1, 2, 4, 8) if tile_m == WARPGROUP_ROWS else (1,):
                    bytes_out = out_bytes if splits == 1 else 4
                    cuts = (Tiling(tile_m, tile_n, s, cluster, shared, splits) for s in range(_MOST_STAGES, 1, -1))
                    result.append(next(tiling for tiling in cuts if tiling.fits(bytes_out)))
    return tuple(result)


# What the estimate assumes of the chip. Cycles are those of the clock at which a Hopper GPU runs without a limit of its
# power, 1.755 GHz.
CLOCK_GHZ = 1.755
TENSOR_PER_CYCLE = 4096  # multiply-adds of one multiprocessor in FP8
# The share of the clock that the power limit allows while the tensor cores are busy: cuBLAS's bfloat16 product reaches
# 769 to 798 of 989 TFLOP/s on random data.
SUSTAINED = 0.82
SHARED_BYTES_PER_CYCLE = 128  # of one multiprocessor's shared memory
L2_BYTES_PER_CYCLE = 44  # that one multiprocessor gets from L2 when all read
HBM_BYTES_PER_CYCLE = 2450  # of all multiprocessors on an H200 (4.3 TB/s copied)
MEMORY_LATENCY = 1400  # cycles until TMA's copy has arrived in shared memory
START_CYCLES = 3500  # launching, setting up barriers, filling the ring: 2 microseconds
EPILOGUE_CYCLES = 800  # to hand a tile to TMA, during which the same warpgroup multiplies nothing


def estimated_cycles(
    tiling: Tiling,
    m: int,
    n: int,
    k: int,
    out_bytes: int,
    by_column: bool,
    multiprocessors: int,
    hbm_bytes_per_cycle: float = HBM_BYTES_PER_CYCLE,
) -> dict[str, float]:
    """Returns the cycles of the busiest multiprocessor, by phases that follow each other.

    start           launch, barriers, the first tile's way to shared memory
    (a resource)    the main loop; the key is what is busy longest in a step (`step_cycles`), or HBM if reading both
                    operands once takes longer
    writing         the result's way to HBM: all multiprocessors finish their tiles at about the same time, so that it
                    hardly overlaps with products; with an accumulator that is read too
    adding parts    the second kernel of a product whose K is split

    Left out: bank conflicts, L2 misses for an operand that is larger than L2, uneven traffic, clocks below the assumed.
    """
    tiles = -(-m // (tiling.tile_m * tiling.cluster_m)) * -(-n // (tiling.tile_n * tiling.cluster_n)) * tiling.splits
    rounds = -(-tiles // (multiprocessors // tiling.cluster))
    steps = -(-k // PROMOTION_INTERVAL // tiling.splits)
    step = step_cycles(tiling, m, by_column)
    bound = max(step, key=step.__getitem__)
    main, reading = rounds * steps * step[bound], (m + n) * k / hbm_bytes_per_cycle
    if reading > main:
        bound, main = "HBM", reading
    result = m * n * out_bytes * (2 if by_column else 1)
    phases = {"start": START_CYCLES, bound: main}
    writing = EPILOGUE_CYCLES * rounds
    if tiling.splits == 1:
        return phases | {"writing": writing + result / hbm_bytes_per_cycle}
    parts = m * n * 4 * tiling.splits
    return phases | {
        "writing": writing + parts / hbm_bytes_per_cycle,
        "adding parts": START_CYCLES + (parts + result) / hbm_bytes_per_cycle,
    }


def step_cycles(tiling: Tiling, m: int, by_column: bool) -> dict[str, float]:
    """Returns for how many cycles a step of 128 of K keeps each resource of a multiprocessor busy.

    tensor cores    4,096 multiply-adds a cycle, slowed down by the limit of power
    shared memory   TMA writes both tiles once; for each 64 rows wgmma reads these rows and all columns
    L2              the step's tiles of A and B, the shared one's divided by the cluster
    one warpgroup   its wgmma alone (the other's fill the gaps only if they can), about 140 cycles of waiting for the
                    operands and for the products, and the promotion: a thread has tile_n / 2 sums of 64 rows
    latency         a stage is filled no sooner than one latency after it was released
    """
    wave = WARPGROUP_ROWS * tiling.tile_n * PROMOTION_INTERVAL / TENSOR_PER_CYCLE
    waves = tiling.tile_m // WARPGROUP_ROWS
    rows = min(tiling.tile_m, m)
    scaling = tiling.tile_n / 4 if by_column else 2 * tiling.tile_n / tiling.scale_columns
    return {
        "tensor cores": waves * wave / SUSTAINED,
        "shared memory": PROMOTION_INTERVAL
        * (tiling.tile_m + tiling.tile_n + waves * (WARPGROUP_ROWS + tiling.tile_n))
        / SHARED_BYTES_PER_CYCLE,
        "L2": PROMOTION_INTERVAL * (rows / tiling.cluster_n + tiling.tile_n / tiling.cluster_m) / L2_BYTES_PER_CYCLE,
        "one warpgroup": tiling.waves * (wave + 140 + tiling.tile_n / 2 + scaling),
        "latency": MEMORY_LATENCY / tiling.stages,
    }
