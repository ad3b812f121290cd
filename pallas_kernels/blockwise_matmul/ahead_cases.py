"""Lists what of this operation is compiled ahead: every tiling in every form, at sizes of V3's own layers."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from pallas_kernels.blockwise_matmul.tuning import TUNED, Tiling, candidates, tilings
from pallas_kernels.compile_ahead import Case
from pallas_kernels.hopper_launch import H200_MULTIPROCESSORS
from pallas_kernels.quantize.quantized import E4M3, Quantized, Tile, scales_shape

_M, _N, _K = 4096, 4096, 7168


# Products of V3: its layers' (N, K) and a number of rows, few in decoding.
_LAYERS = ((2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048))
_ROWS = (1, 64, 128, 512, 4096)
# Tilings that differ in code, of the block-scaled product: consumers, waves, the operand shared, parts of K.
_BY_BLOCK = (
    Tiling(128, 192, 4, 2, "b"),
    Tiling(256, 128, 3, 2, "a"),
    Tiling(64, 16, 12, 2, "a"),
    Tiling(64, 48, 8, splits=4),
)
_BY_COLUMN = (Tiling(128, 128, 4, 2, "b"),)


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

    def cases(b_tile: Tile, essential: tuple[Tiling, ...]) -> Iterator[Case]:
        by_column = b_tile == "1x128"
        out_bytes = 4 if by_column else 2
        every = [t for t in tilings(out_bytes, by_column) if t.splits == 1 and t.cluster == 2 and t.shared == "b"]
        chosen = [
            candidates(m, n, k, out_bytes, by_column, H200_MULTIPROCESSORS, 1)[0] for m in _ROWS for n, k in _LAYERS
        ]
        form = "1x128 tiles, float32 added to" if by_column else "128x128 blocks, bfloat16"
        tuned = [] if by_column else [*TUNED.values()]
        distinct: list[Tiling] = [*dict.fromkeys((*essential, *tuned, *chosen, *every))]
        for tiling in distinct:
            yield case(f"{form}, {tiling.words()}", tiling, b_tile, tiling not in essential)

    # N = 2112 and K = 2112 are V3's joint down-projection: a multiple of 64 but not of 128. The last sizes fit no tile.
    ragged = [
        case("128x128 blocks, N = 2112", None, "128x128", True, (_M, 2112, _K)),
        case("128x128 blocks, K = 2112", None, "128x128", True, (_M, _K, 2112)),
        case("128x128 blocks, 1 x 333 x 1000", None, "128x128", True, (1, 333, 1000)),
        case("128x128 blocks, 1000 x 333 x 1000", None, "128x128", False, (1000, 333, 1000)),
        case("1x128 tiles, 1000 x 333 x 1000, float32 added to", None, "1x128", True, (1000, 333, 1000)),
    ]
    return [*cases("128x128", _BY_BLOCK), *cases("1x128", _BY_COLUMN), *ragged]


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
