"""Checks the grouped products against float64: every tiling, empty groups, rows past the groups, masked rows."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
from cases import BFLOAT16, FLOAT32_SUM, FP8_SUM, Case, error_case, normal
from float64 import expert_tiles, of, tiles, wide

import pallas_kernels as pk
from pallas_kernels.grouped_matmul import hopper
from pallas_kernels.grouped_matmul.tiling import candidates

ROWS, OUT, IN = 2304, 1152, 1088  # 18 x 9 tiles of 128: more than 132 multiprocessors
SIZES = (384, 0, 128, 1024, 0, 512)  # 256 rows belong to no group
COUNTS, CAPACITY = (0, 1, 130, 300, 64, 128), 300
TINY_SIZES, TINY = (128, 0, 128), (384, 96, 160)


def cases(tiny: bool, form: str, cluster: int = 0) -> Iterator[Case]:
    """Yields cases of a form: "fp8" or "bf16" with every tiling of `cluster` blocks, or the "public" functions."""
    rows, out, width = TINY if tiny else (ROWS, OUT, IN)
    sizes = TINY_SIZES if tiny else SIZES
    if form == "public":
        yield from public(rows, out, width, len(sizes))
        yield from in_parts(rows, out, width, sizes)
        return
    fp8 = form == "fp8"
    for along, out_bytes in (("rows", 2), ("depth", 4)):
        for tiling in candidates(along, fp8, out_bytes):
            if tiling.cluster != cluster or (tiny and tiling.tile_n != 128):
                continue
            for kind in (
                ("depth",) if along == "depth" else ("rows", "masked") if fp8 else ("rows", "transposed", "masked")
            ):
                name = f"{kind}, {tiling.tile_n} columns, {tiling.stages} stages, cluster {cluster}"
                yield one(name, kind, fp8, rows, out, width, sizes, tiling)


def one(name: str, kind: str, fp8: bool, rows: int, out: int, width: int, sizes: tuple, tiling) -> Case:
    """Returns the case of one form of the product with one tiling."""
    groups, bf16 = len(sizes), jnp.bfloat16
    capacity, counts = (40, (0, 1, 33)) if groups == 3 else (CAPACITY, COUNTS)
    tolerance = BFLOAT16 if kind != "depth" else FP8_SUM if fp8 else FLOAT32_SUM
    height = groups * capacity if kind == "masked" else rows
    if kind == "depth":
        left, right = operand(out, rows, fp8, 0, True), operand(width, rows, fp8, 1, True)
        call = lambda a, b, sizes: hopper.rows_by_rows(a, b, sizes, tiling=tiling)  # noqa: E731
        expected = functools.partial(by_depth, left, right, sizes, fp8)
        right_tile = "1x128"
    else:
        left, right = operand(height, width, fp8, 0), weights(groups, out, width, fp8)
        right_tile = "128x128"
        expected = functools.partial(by_rows, left, right, sizes, fp8)
        call = lambda a, b, sizes: hopper.rows_by_weights(a, b, sizes, bf16, tiling=tiling)  # noqa: E731
        if kind == "transposed":
            right = np.ascontiguousarray(right.swapaxes(1, 2))
            call = lambda a, b, sizes: hopper.rows_by_weights(  # noqa: E731
                a, b, sizes, bf16, transposed=True, tiling=tiling
            )
        if kind == "masked":
            expected = functools.partial(by_mask, left, right, counts, capacity, fp8)
            call = lambda a, b, counts: hopper.masked(a, b, counts, bf16, tiling=tiling)  # noqa: E731

    def function(a, b, sizes):
        if fp8:
            a, b = of(a, "1x128"), of(b, right_tile)
        if kind == "masked":
            a = (
                pk.Quantized(*(x.reshape(groups, capacity, -1) for x in (a.values, a.scales)), "1x128")
                if fp8
                else a.reshape(groups, capacity, -1)
            )
        return call(a, b, sizes)

    vector = np.asarray(counts if kind == "masked" else sizes, "i4")
    return error_case(name, function, (left, right, vector), expected, tolerance)


def public(rows: int, out: int, width: int, groups: int) -> Iterator[Case]:
    """Yields the public functions with groups of sizes that are no multiples of anything."""
    sizes = np.random.default_rng(5).multinomial(rows - 100, np.ones(groups) / groups).astype("i4")
    sizes[1] = 0
    sizes = tuple(int(s) for s in sizes)
    vector = np.asarray(sizes, "i4")
    for fp8 in (False, True):
        left, right = operand(rows, width, fp8, 0), weights(groups, out, width, fp8)

        def product(a, b, sizes, fp8=fp8):
            a, b = (of(a, "1x128"), of(b, "128x128")) if fp8 else (a, b)
            return pk.grouped_matmul(a, b, sizes)

        expected = functools.partial(by_rows, left, right, sizes, fp8)
        name = f"grouped_matmul {'FP8' if fp8 else 'bf16'}, any group sizes"
        yield error_case(name, product, (left, right, vector), expected, BFLOAT16)
    left, right = operand(rows, out, False, 2), operand(rows, width, False, 0)
    expected = functools.partial(by_depth, left.T, right.T, sizes, False, False)
    name = "grouped_weight_gradient bf16, any group sizes"
    yield error_case(name, pk.grouped_weight_gradient, (left, right, vector), expected, FLOAT32_SUM)


def in_parts(rows: int, out: int, width: int, sizes: tuple[int, ...]) -> Iterator[Case]:
    """Yields weight gradients over rows in two parts with other sizes each, added to an accumulator."""
    of_parts, sums = (sizes, sizes[::-1]), normal(len(sizes), out, width, seed=8).astype("f4")
    for fp8 in (False, True):
        left, right = operand(out, 2 * rows, fp8, 3, True), operand(width, 2 * rows, fp8, 4, True)

        def part(x, fp8=fp8):
            """Returns an operand with a leading axis of parts."""
            if not fp8:
                return x.reshape(2, rows, -1)
            cut = (jnp.moveaxis(leaf.reshape(leaf.shape[0], 2, -1), 1, 0) for leaf in x)
            return pk.Quantized(*cut, "1x128")

        def gradient(a, b, sums, sizes, part=part):
            return pk.grouped_weight_gradient(part(a), part(b), sizes, accumulator=sums, row_alignment=128)

        arguments = left, right, sums, np.asarray(of_parts, "i4")
        expected = functools.partial(by_parts, left, right, sums, of_parts, rows, fp8)
        name = f"grouped_weight_gradient {'FP8' if fp8 else 'bf16'}, in parts, added"
        yield error_case(name, gradient, arguments, expected, FP8_SUM if fp8 else FLOAT32_SUM)


@functools.cache
def operand(rows: int, columns: int, fp8: bool, seed: int, transposed: bool = False):
    """Returns a random matrix; a bfloat16 one transposed where asked (FP8 forms along the depth take it as it is)."""
    if fp8:
        return tiles(rows, columns, "1x128", seed)
    return normal(columns, rows, seed=seed) if transposed else normal(rows, columns, seed=seed)


@functools.cache
def weights(groups: int, out: int, width: int, fp8: bool):
    return expert_tiles(groups, out, width) if fp8 else normal(groups, out, width, seed=7)


def _wide(x, fp8: bool, tile: str = "1x128") -> np.ndarray:
    return wide(x, tile) if fp8 else x.astype("f8")


def _ranges(sizes) -> list[slice]:
    ends = np.cumsum(sizes)
    return [slice(int(end - size), int(end)) for end, size in zip(ends, sizes, strict=True)]


def _expert(right, group: int, fp8: bool) -> np.ndarray:
    return wide((right[0][group], right[1][group]), "128x128") if fp8 else right[group].astype("f8")


def by_rows(left, right, sizes, fp8: bool) -> np.ndarray:
    a, out = _wide(left, fp8), (right[0] if fp8 else right).shape[1]
    result = np.zeros((a.shape[0], out))
    for group, rows in enumerate(_ranges(sizes)):
        result[rows] = a[rows] @ _expert(right, group, fp8).T
    return result


def by_mask(left, right, counts, capacity: int, fp8: bool) -> np.ndarray:
    a = _wide(left, fp8).reshape(len(counts), capacity, -1)
    result = np.zeros((len(counts), capacity, (right[0] if fp8 else right).shape[1]))
    for group, count in enumerate(counts):
        result[group, :count] = a[group, :count] @ _expert(right, group, fp8).T
    return result


def by_depth(left, right, sizes, fp8: bool, row_major: bool = True) -> np.ndarray:
    """Returns left[:, rows of g] right[:, rows of g]ᵀ; bfloat16 operands are [rows, columns] if `row_major`."""
    a, b = _wide(left, fp8), _wide(right, fp8)
    if not fp8 and row_major:
        a, b = a.T, b.T
    return np.stack([a[:, rows] @ b[:, rows].T for rows in _ranges(sizes)])


def by_parts(left, right, sums, of_parts, rows: int, fp8: bool) -> np.ndarray:
    """Returns the sums plus the weight gradients of all parts, which have `rows` rows each."""
    a, b = (_wide(x, fp8) if fp8 else _wide(x, fp8).T for x in (left, right))
    result = sums.astype("f8")
    for index, sizes in enumerate(of_parts):
        at = slice(index * rows, (index + 1) * rows)
        result = result + np.stack([a[:, at][:, own] @ b[:, at][:, own].T for own in _ranges(sizes)])
    return result
