"""Lists what of this operation is compiled ahead: every form and its tilings, at sizes of V3's experts, 32 of them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.compile_ahead import Case
from pallas_kernels.grouped_matmul.tiling import Tiling, candidates
from pallas_kernels.quantize.quantized import E4M3, Quantized, Tile, scales_shape

_ROWS, _GROUPS, _OUT, _IN = 32768, 32, 4096, 7168
_MASKED_ROWS = 128  # rows per group in the masked layout


def hopper() -> list[Case]:
    from pallas_kernels.grouped_matmul import hopper as kernels

    def cases() -> Iterator[Case]:
        for fp8 in (False, True):
            for form, function, arguments, out_bytes in _forms(fp8, kernels):
                tilings = candidates("depth" if form == "depth" else "rows", fp8, out_bytes)
                # The other forms differ from "rows" by a mask or the order of the weights only: of these the widest
                # tiling in a cluster is compiled, which needs most registers and shared memory.
                for tiling in tilings if form in ("rows", "depth") else tilings[:1]:
                    name = f"{form}, {'FP8' if fp8 else 'bfloat16'}, {_words(tiling)}"
                    variant = tiling != tilings[0] or form == "rows, transposed weights"
                    yield Case(name, functools.partial(function, tiling=tiling), arguments, variant)

    columns = _operand((_OUT, _ROWS), True, "1x128"), _operand((_IN, _ROWS), True, "1x128")
    sums = jax.ShapeDtypeStruct((_GROUPS, _OUT, _IN), jnp.float32)
    sizes = jax.ShapeDtypeStruct((_GROUPS,), jnp.int32)
    added = Case("depth, FP8, added to an accumulator", kernels.rows_by_rows, (*columns, sizes, sums), variant=True)
    parts = [
        Case(f"depth in parts, {'FP8' if fp8 else 'bfloat16'}", kernels.rows_by_rows, _in_parts(fp8), variant=True)
        for fp8 in (False, True)
    ]
    return [*cases(), added, *parts]


def _forms(fp8: bool, kernels: Any) -> Iterator[tuple[str, Any, tuple[Any, ...], int]]:
    """Yields name, function, arguments and bytes of an output element of each form."""
    sizes = jax.ShapeDtypeStruct((_GROUPS,), jnp.int32)
    rows, weights = _operand((_ROWS, _IN), fp8, "1x128"), _operand((_GROUPS, _OUT, _IN), fp8, "128x128")
    yield "rows", functools.partial(kernels.rows_by_weights, out_dtype=jnp.bfloat16), (rows, weights, sizes), 2
    padded = _operand((_GROUPS, _MASKED_ROWS, _IN), fp8, "1x128")
    yield "masked", functools.partial(kernels.masked, out_dtype=jnp.bfloat16), (padded, weights, sizes), 2
    if fp8:
        columns = _operand((_OUT, _ROWS), fp8, "1x128"), _operand((_IN, _ROWS), fp8, "1x128")
        yield "depth", kernels.rows_by_rows, (*columns, sizes), 4
    else:
        out_bar = _operand((_ROWS, _OUT), fp8, "1x128")
        transposed = functools.partial(kernels.rows_by_weights, out_dtype=jnp.bfloat16, transposed=True)
        yield "rows, transposed weights", transposed, (out_bar, weights, sizes), 2
        yield "depth", kernels.rows_by_rows, (out_bar, rows, sizes), 4


def _in_parts(fp8: bool) -> tuple[Any, ...]:
    """Returns the operands of a weight gradient whose rows come in eight parts, and what it is added to."""
    widths = ((_OUT, _ROWS // 8), (_IN, _ROWS // 8)) if fp8 else ((_ROWS // 8, _OUT), (_ROWS // 8, _IN))
    sizes = jax.ShapeDtypeStruct((8, _GROUPS), jnp.int32)
    sums = jax.ShapeDtypeStruct((_GROUPS, _OUT, _IN), jnp.float32)
    return *(_operand((8, *shape), fp8, "1x128") for shape in widths), sizes, sums


def _operand(shape: tuple[int, ...], fp8: bool, tile: Tile) -> Any:
    if not fp8:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    scales = jax.ShapeDtypeStruct(scales_shape(shape, tile), jnp.float32)
    return Quantized(jax.ShapeDtypeStruct(shape, E4M3), scales, tile)  # pyright: ignore[reportArgumentType]


def _words(tiling: Tiling) -> str:
    return f"{tiling.tile_n} columns, {tiling.stages} stages, cluster {tiling.cluster}"


def tpu() -> list[Case]:
    from pallas_kernels.grouped_matmul import tpu as kernels

    def cases() -> Iterator[Case]:
        for fp8 in (False, True):
            words = "FP8" if fp8 else "bfloat16"
            for form, function, arguments, _ in _forms(fp8, kernels):
                yield Case(f"{form}, {words}", function, arguments, variant=not fp8 and "rows" in form)
            yield Case(f"depth in parts, {words}", kernels.rows_by_rows, _in_parts(fp8), variant=True)

    return list(cases())
