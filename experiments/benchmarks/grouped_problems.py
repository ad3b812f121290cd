"""Defines the grouped matrix products that kernels.py measures: V3's experts with even and with skewed loads."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from kernel_problems import OURS, Contender, Problem, Search, float64, relative, some

import pallas_kernels as pk
from pallas_kernels.grouped_matmul import hopper, tiling


def group_sizes(rows: int, groups: int, skewed: bool) -> np.ndarray:
    """Returns group sizes, multiples of 128 that sum to `rows`: equal, or skewed as 1/i with some groups empty."""
    weights = 1 / np.arange(1, groups + 1) if skewed else np.ones(groups)
    tiles = np.floor(weights / weights.sum() * (rows // 128)).astype(int)
    tiles[0] += rows // 128 - tiles.sum()
    return (tiles * 128).astype("i4")


def grouped(rows: int, groups: int, n: int, k: int, skewed: bool) -> Problem:
    """Returns the problem of multiplying rows, sorted by expert, by the weights [n, k] of their experts."""
    sizes = group_sizes(rows, groups, skewed)

    def make(key):
        keys = jax.random.split(key)
        x, w = (
            jax.random.normal(keys[0], (rows, k), jnp.bfloat16),
            jax.random.normal(keys[1], (groups, n, k), jnp.bfloat16),
        )
        quantized = {"a": pk.quantize(x, tile="1x128"), "b": pk.quantize(w, tile="128x128")}
        b = quantized["b"]
        one = pk.Quantized(b.values[0], b.scales[0], b.tile)
        return {"x": x, "w": w, "wt": jnp.swapaxes(w, 1, 2), **quantized, "one": one, "sizes": jnp.asarray(sizes)}

    def error(inputs, out):
        chosen, experts = some(rows), np.repeat(np.arange(groups), sizes)
        a = float64(inputs["a"], chosen)
        wanted = np.zeros((len(chosen), n))
        for expert in np.unique(experts[chosen]):
            mine = experts[chosen] == expert
            b = inputs["b"]
            wanted[mine] = a[mine] @ float64(pk.Quantized(b.values[expert], b.scales[expert], b.tile)).T
        return relative(np.asarray(out)[chosen], wanted)

    def ours(a, b, sizes):
        return pk.grouped_matmul(a, b, sizes, row_alignment=128)

    contenders = {
        OURS: Contender(ours, ("a", "b", "sizes")),
        "this project, bf16": Contender(
            lambda x, w, sizes: pk.grouped_matmul(x, w, sizes, row_alignment=128), ("x", "w", "sizes")
        ),
        "one dense FP8 product of the rows": Contender(pk.blockwise_matmul, ("a", "one")),
        "lax.ragged_dot bf16": Contender(lax.ragged_dot, ("x", "wt", "sizes")),
    }
    if tokamax := _tokamax():
        contenders["tokamax bf16"] = Contender(tokamax.ragged_dot, ("x", "wt", "sizes"))
    name = f"{groups} groups, {'skewed' if skewed else 'even'}, {rows} x {n} x {k}"
    used = int((sizes > 0).sum())
    size = 2.0 * rows * n * k, rows * k + 1.0 * used * n * k + 2.0 * rows * n
    search = Search(
        tiling, ("rows fp8", n, k, groups), tiling.candidates("rows", True, 2), ("a", "b", "sizes"),
        lambda cut, a, b, sizes: hopper.rows_by_weights(a, b, sizes, jnp.bfloat16, tiling=cut),
    )  # fmt: skip
    return Problem("grouped", name, make, contenders, error, 4e-3, *size, search)


def grouped_weight_gradient(rows: int, groups: int, n: int, k: int, skewed: bool) -> Problem:
    """Returns the problem of the experts' weight gradients [groups, n, k] in float32, each a sum over an expert's rows.

    Both operands are quantised in 1x128 tiles along the rows.
    """
    sizes = group_sizes(rows, groups, skewed)
    starts = np.cumsum(sizes) - sizes

    def make(key):
        keys = jax.random.split(key)
        y = jax.random.normal(keys[0], (n, rows), jnp.bfloat16)
        x = jax.random.normal(keys[1], (k, rows), jnp.bfloat16)
        quantized = {"a": pk.quantize(y, tile="1x128"), "b": pk.quantize(x, tile="1x128")}
        return {"y": y.T, "x": x.T, **quantized, "sizes": jnp.asarray(sizes)}

    def error(inputs, out):
        chosen = some(n)[:4]
        a, b = float64(inputs["a"], chosen), float64(inputs["b"])
        ranges = [slice(start, start + size) for start, size in zip(starts, sizes, strict=True)]
        return relative(np.asarray(out[:, chosen]), np.stack([a[:, rows] @ b[:, rows].T for rows in ranges]))

    def ours(a, b, sizes):
        return pk.grouped_weight_gradient(a, b, sizes, row_alignment=128)

    contenders = {
        OURS: Contender(ours, ("a", "b", "sizes")),
        "this project, bf16": Contender(ours, ("y", "x", "sizes")),
        "lax.ragged_dot_general bf16": Contender(_ragged_depth, ("y", "x", "sizes")),
    }
    name = f"{groups} groups, {'skewed' if skewed else 'even'}, {n} x {k} over {rows}"
    size = 2.0 * rows * n * k, rows * (n + k) + 4.0 * groups * n * k
    search = Search(
        tiling, ("depth fp8", k, rows, groups), tiling.candidates("depth", True, 4), ("a", "b", "sizes"),
        lambda cut, a, b, sizes: hopper.rows_by_rows(a, b, sizes, tiling=cut),
    )  # fmt: skip
    return Problem("grouped weight gradient", name, make, contenders, error, 1e-3, *size, search)


def _ragged_depth(y, x, sizes):
    """Computes the weight gradients with XLA's own product with groups along the contracted dimension."""
    contracted = (((0,), (0,)), ((), ()))
    dimensions = lax.RaggedDotDimensionNumbers(contracted, lhs_ragged_dimensions=[0], rhs_group_dimensions=[])
    return lax.ragged_dot_general(y, x, sizes, dimensions, preferred_element_type=jnp.float32)


def masked(groups: int, capacity: int, n: int, k: int) -> Problem:
    """Returns the problem of decoding: a buffer of `capacity` rows per expert, of which about a tenth are filled."""
    counts = np.random.default_rng(0).binomial(capacity, 0.1, groups).astype("i4")

    def make(key):
        keys = jax.random.split(key)
        x = jax.random.normal(keys[0], (groups, capacity, k), jnp.bfloat16)
        w = jax.random.normal(keys[1], (groups, n, k), jnp.bfloat16)
        quantized = {"a": pk.quantize(x, tile="1x128"), "b": pk.quantize(w, tile="128x128")}
        return {"x": x, "w": w, **quantized, "counts": jnp.asarray(counts)}

    def error(inputs, out):
        group = int(np.argmax(counts))
        a, b = (pk.Quantized(q.values[group], q.scales[group], q.tile) for q in (inputs["a"], inputs["b"]))
        wanted = float64(a) @ float64(b).T
        wanted[counts[group] :] = 0
        return relative(np.asarray(out[group]), wanted)

    contenders = {
        OURS: Contender(pk.masked_grouped_matmul, ("a", "b", "counts")),
        "this project, bf16": Contender(pk.masked_grouped_matmul, ("x", "w", "counts")),
        "XLA bf16, all rows": Contender(lambda x, w: jnp.einsum("gmk,gnk->gmn", x, w), ("x", "w")),
    }
    rows = int(counts.sum())
    used = int((counts > 0).sum())
    size = 2.0 * rows * n * k, rows * k + 1.0 * used * n * k + 2.0 * groups * capacity * n
    name = f"{groups} groups of {capacity}, {rows} rows, {n} x {k}"
    return Problem("masked", name, make, contenders, error, 4e-3, *size)


def _tokamax() -> Any:
    """Returns the module tokamax, or None if it is not installed."""
    try:
        import tokamax  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    return tokamax
