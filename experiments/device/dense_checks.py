"""Checks the dense FP8 product with every tiling, and at ragged sizes, against float64."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
from cases import BFLOAT16, FP8_SUM, Case, error_case, normal
from float64 import of, tiles, wide

import pallas_kernels as pk
from pallas_kernels.blockwise_matmul import hopper
from pallas_kernels.blockwise_matmul.tuning import Tiling

# Every form of tile: consumers, waves, widths with many and few scales per block, the operand shared, parts of K.
PRODUCT = (
    Tiling(128, 192, 4, 2, "b"),
    Tiling(128, 128, 5, 2, "a"),
    Tiling(128, 144, 5, 2, "b"),
    Tiling(256, 96, 4, 2, "a"),
    Tiling(64, 16, 12, 2, "a"),
    Tiling(64, 112, 9, 2, "b"),
    Tiling(128, 192, 4),
    Tiling(128, 160, 5),
    Tiling(256, 64, 5),
    Tiling(64, 48, 8, splits=4),
)
WEIGHT_GRADIENT = (
    Tiling(128, 128, 4, 2, "b"),
    Tiling(128, 112, 5, 2, "a"),
    Tiling(128, 128, 4),
    Tiling(64, 48, 8, splits=4),
)


def cases(tiny: bool, form: str, cluster: int = 0) -> Iterator[Case]:
    """Yields cases of a form: "product", "weight gradient" (both with every tiling of `cluster` blocks) or "ragged"."""
    if form == "ragged":
        # Rows, columns, depth: V3's joint down-projection, few rows as in decoding, sizes that fit no tile.
        shapes = ((100, 72, 200),) if tiny else ((512, 2112, 7168), (512, 7168, 2112), (64, 2112, 7168), (1, 576, 512))
        for m, n, k in (*shapes, (40, 24, 136) if tiny else (1000, 333, 200)):
            yield product(None, m, n, k, jnp.bfloat16)
            yield product(None, m, n, k, jnp.float32)
            yield from weight_gradient(None, m, n, k)
        return
    m, n, k = (160, 144, 200) if tiny else (2304, 2112, 2112)  # more tiles than 132 multiprocessors
    tilings = [t for t in (PRODUCT if form == "product" else WEIGHT_GRADIENT) if t.cluster == cluster]
    for tiling in tilings[:1] if tiny else tilings:
        if form == "product":
            yield product(tiling, m, n, k, jnp.bfloat16)
        else:
            yield from weight_gradient(tiling, m, n, k)


def product(tiling, m: int, n: int, k: int, out_dtype) -> Case:
    """Returns the case of 1x128 tiles times 128x128 blocks; the public function for no `tiling`."""
    name = f"{m} x {n} x {k} {jnp.dtype(out_dtype).name}{words(tiling)}"
    tolerance = BFLOAT16 if out_dtype == jnp.bfloat16 else FP8_SUM

    def function(a, b):
        if tiling is None:
            return pk.blockwise_matmul(of(a, "1x128"), of(b, "128x128"), out_dtype=out_dtype)
        return hopper.matmul(of(a, "1x128"), of(b, "128x128"), None, out_dtype, tiling=tiling)

    inputs = tiles(m, k, "1x128"), tiles(n, k, "128x128", seed=1)
    return error_case(name, function, inputs, lambda: wanted(m, n, k, "128x128"), tolerance)


def weight_gradient(tiling, m: int, n: int, k: int) -> Iterator[Case]:
    """Yields the product of 1x128 tiles both in float32, alone and added to an accumulator."""
    accumulator = normal(m, n, seed=3, dtype="float32") * np.float32(8)

    def function(a, b, accumulator=None):
        if tiling is None:
            return pk.blockwise_matmul(of(a, "1x128"), of(b, "1x128"), accumulator=accumulator, out_dtype=jnp.float32)
        return hopper.matmul(of(a, "1x128"), of(b, "1x128"), accumulator, jnp.float32, tiling=tiling)

    pair = tiles(m, k, "1x128"), tiles(n, k, "1x128", seed=1)
    name = f"{m} x {n} x {k} 1x128 both{words(tiling)}"
    yield error_case(name, function, pair, lambda: wanted(m, n, k, "1x128"), FP8_SUM)
    total = lambda: wanted(m, n, k, "1x128") + accumulator  # noqa: E731
    yield error_case(f"{name}, added", function, (*pair, accumulator), total, FP8_SUM)


@functools.cache
def wanted(m: int, n: int, k: int, tile: str) -> np.ndarray:
    return wide(tiles(m, k, "1x128"), "1x128") @ wide(tiles(n, k, tile, seed=1), tile).T


def words(tiling) -> str:
    if tiling is None:
        return ""
    return f", tile {tiling.words()}"
