"""Lists what of this operation is compiled ahead: every tiling in every form, at sizes of V3's own layers."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from pallas_kernels.blockwise_matmul.tuning import TUNED, Tiling, candidates
from pallas_kernels.compile_ahead import Case
from pallas_kernels.quantize.quantized import E4M3, Quantized, Tile, scales_shape

_M, _N, _K = 4096, 4096, 7168


def hopper() -> list[Case]:
    from pallas_kernels.blockwise_matmul import hopper as kernel

    def case(name: str, tiling: Tiling | None, b_tile: Tile, variant: bool, sizes=(_M, _N, _K)) -> Case:
        m, n, k = sizes
        a, b = _shapes(m, k, "1x128"), _shapes(n, k, b_tile)
        # A weight gradient is added to one in float32, the other products are written in bfloat16.
        accumulator = jax.ShapeDtypeStruct((m, n), jnp.float32) if b_tile == "1x128" else None
        out_dtype = jnp.bfloat16 if accumulator is None else jnp.float32
        product = functools.partial(kernel.matmul, out_dtype=out_dtype, tiling=tiling)
        return Case(name, product, (a, b, accumulator), variant)

    def cases() -> Iterator[Case]:
        for tiling in {*candidates(2, by_column=False), *TUNED.values()}:
            widest = tiling.tile_n == 192 and tiling.cluster == 2
            yield case(f"128x128 blocks, bfloat16, {_words(tiling)}", tiling, "128x128", not widest)
        for tiling in candidates(4, by_column=True):
            widest = tiling.tile_n == 128 and tiling.cluster == 2
            yield case(f"1x128 tiles, float32 added to, {_words(tiling)}", tiling, "1x128", not widest)

    # N = 2112 and K = 2112 are V3's joint down-projection: a multiple of 64 but not of 128. The last sizes fit no tile.
    ragged = [
        case("128x128 blocks, N = 2112", None, "128x128", True, (_M, 2112, _K)),
        case("128x128 blocks, K = 2112", None, "128x128", True, (_M, _K, 2112)),
        case("128x128 blocks, 1000 x 333 x 1000", None, "128x128", False, (1000, 333, 1000)),
        case("1x128 tiles, 1000 x 333 x 1000, float32 added to", None, "1x128", True, (1000, 333, 1000)),
    ]
    return [*sorted(cases(), key=lambda case: case.name), *ragged]


def _words(tiling: Tiling) -> str:
    return f"tile {tiling.tile_m}x{tiling.tile_n}, {tiling.stages} stages, cluster {tiling.cluster}"


def _shapes(rows: int, columns: int, tile: Tile) -> Quantized:
    values = jax.ShapeDtypeStruct((rows, columns), E4M3)
    return Quantized(values, jax.ShapeDtypeStruct(scales_shape((rows, columns), tile), jnp.float32), tile)  # pyright: ignore


def tpu() -> list[Case]:
    from pallas_kernels.blockwise_matmul import tpu as kernel

    def case(name: str, b_tile: Tile, out_dtype, accumulator: jax.ShapeDtypeStruct | None) -> Case:
        a, b = _shapes(_M, _K, "1x128"), _shapes(_N, _K, b_tile)
        return Case(name, functools.partial(kernel.matmul, out_dtype=out_dtype), (a, b, accumulator))

    return [
        case("128x128 blocks, bfloat16", "128x128", jnp.bfloat16, None),
        case("1x128 tiles, float32 added to", "1x128", jnp.float32, jax.ShapeDtypeStruct((_M, _N), jnp.float32)),
    ]
