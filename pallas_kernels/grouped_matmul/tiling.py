"""Tilings of the grouped products on Hopper, and the one that a problem gets."""

from __future__ import annotations

import dataclasses
from typing import Literal

from pallas_kernels.blockwise_matmul.tuning import (
    EPILOGUE_CYCLES,
    L2_BYTES_PER_CYCLE,
    SHARED_BYTES_PER_CYCLE,
    SUSTAINED,
    TENSOR_PER_CYCLE,
    TILE_M,
    WARPGROUP_ROWS,
)
from pallas_kernels.hopper_launch import SHARED_MEMORY_BYTES
from pallas_kernels.quantize.quantized import PROMOTION_INTERVAL

# Bytes of a row that one stage holds: of FP8 the values between two promotions, of bfloat16 half as many.
STAGE_BYTES = PROMOTION_INTERVAL
PART = 64  # columns of a tile that are written together
WARPGROUPS = 2  # warpgroups that multiply

Groups = Literal["rows", "depth"]  # groups along the rows, or along the contraction


@dataclasses.dataclass(frozen=True)
class Tiling:
    """One way to cut a product into tiles.

    Attributes:
      tile_n: columns of a block's tile.
      stages: steps of the contraction for which the ring between producer and consumers has buffers.
      cluster: how many blocks, neighbours along the columns, share each tile of the left operand, which is loaded once
        (TMA multicast). Neighbours along the rows may belong to two groups, so the right operand cannot be shared.
    """

    tile_n: int
    stages: int
    cluster: int = 1

    def __post_init__(self) -> None:
        if self.tile_n not in (64, 128, 192, 256) or self.cluster not in (1, 2) or self.stages < 2:
            raise ValueError(f"{self} needs a tile_n of 64, 128, 192 or 256, a cluster of 1 or 2 and 2 stages or more")

    def shared_memory_bytes(self, fp8: bool, out_bytes: int) -> int:
        stage = (TILE_M + self.tile_n) * STAGE_BYTES + (4 * self.tile_n if fp8 else 0)
        return self.stages * stage + WARPGROUPS * self.slots * 64 * PART * out_bytes + 2048

    def fits(self, fp8: bool, out_bytes: int) -> bool:
        return self.shared_memory_bytes(fp8, out_bytes) <= SHARED_MEMORY_BYTES

    @property
    def slots(self) -> int:
        """How many buffers a warpgroup has for parts of a tile being written; it divides their number."""
        parts = self.tile_n // PART
        return 2 if parts % 2 == 0 else parts


def candidates(groups_along: Groups, fp8: bool, out_bytes: int) -> tuple[Tiling, ...]:
    """Returns the tuning space. FP8 has two sets of sums in registers; along the depth the columns' scales too."""
    widths = (256, 128) if not fp8 else (192, 128, 64) if groups_along == "rows" else (128, 64)
    cuts = []
    for cluster in (2, 1):
        for tile_n in widths:
            fitting = (Tiling(tile_n, stages, cluster) for stages in (6, 5, 4, 3))
            cuts.append(next(tiling for tiling in fitting if tiling.fits(fp8, out_bytes)))
    return tuple(cuts)


# (Form and format, out columns, contraction, groups) to the fastest cut, as measured by `experiments/device/run.py`.
TUNED: dict[tuple[str, int, int, int], Tiling] = {}


def choose_tiling(
    groups_along: Groups, columns: int, contraction: int, groups: int, fp8: bool, out_bytes: int
) -> Tiling:
    """Returns the tuned entry, or the tiling with the fewest estimated cycles for 128 rows and all columns."""
    tuned = TUNED.get((f"{groups_along} {'fp8' if fp8 else 'bf16'}", columns, contraction, groups))
    if tuned and tuned.fits(fp8, out_bytes):
        return tuned
    depth = contraction if groups_along == "rows" else -(-contraction // groups)

    def cycles(tiling: Tiling) -> float:
        tiles = -(-columns // (tiling.tile_n * tiling.cluster)) * tiling.cluster
        steps = -(-depth // (STAGE_BYTES if fp8 else STAGE_BYTES // 2))
        return tiles * (steps * max(step_cycles(tiling, groups_along, fp8).values()) + EPILOGUE_CYCLES)

    return min(candidates(groups_along, fp8, out_bytes), key=cycles)


def step_cycles(tiling: Tiling, groups_along: Groups, fp8: bool) -> dict[str, float]:
    """Returns for how many cycles one stage keeps each resource busy, as `blockwise_matmul.tuning.step_cycles`.

    A stage is 128 bytes of the contraction, which take the tensor cores the same time in FP8 and in bfloat16. Sums in
    bfloat16 are not promoted, and a warpgroup has two products in flight; along the depth each FP8 sum has a scale of
    its own.
    """
    products = TILE_M * tiling.tile_n * STAGE_BYTES / TENSOR_PER_CYCLE
    read_and_written = TILE_M + tiling.tile_n + WARPGROUPS * (WARPGROUP_ROWS + tiling.tile_n)
    busy = {
        "tensor cores": products / SUSTAINED,
        "shared memory": STAGE_BYTES * read_and_written / SHARED_BYTES_PER_CYCLE,
        "L2": STAGE_BYTES * (TILE_M / tiling.cluster + tiling.tile_n) / L2_BYTES_PER_CYCLE,
    }
    if fp8:
        promotion = tiling.tile_n * (1 / 2 if groups_along == "rows" else 3 / 4)
        busy["one warpgroup"] = products / WARPGROUPS + promotion + 140
    return busy
