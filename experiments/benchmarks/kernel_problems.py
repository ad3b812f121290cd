"""Defines what kernels.py measures: for each operation its inputs, contenders, an independent check, and its size.

This file has the dense products and quantisation; grouped_problems.py and routing_problems.py have the others.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import pallas_kernels as pk
from pallas_kernels.blockwise_matmul import hopper, tuning
from pallas_kernels.hopper_launch import multiprocessors
from pallas_kernels.quantize.quantized import Tile

OURS = "this project"
CHECKED_ROWS = 48  # rows that are compared with float64


@dataclasses.dataclass(frozen=True)
class Contender:
    """One implementation of a problem: a function to jit, and the names of the problem's inputs that it takes."""

    function: Callable[..., Any]
    inputs: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Search:
    """The tilings of a Hopper kernel that `--tune` compares.

    Attributes:
      module: the module whose dictionary `TUNED` stores the fastest tiling.
      key: the key in that dictionary.
      cuts: the tilings to compare.
      inputs: names of the problem's inputs that the kernel takes.
      function: maps (tiling, *inputs) to the kernel's result.
    """

    module: types.ModuleType
    key: tuple[Any, ...]
    cuts: tuple[Any, ...]
    inputs: tuple[str, ...]
    function: Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Problem:
    """A problem that is checked and timed: one row of the table.

    Attributes:
      family: one of kernels.FAMILIES.
      name: the sizes, for the table.
      make: maps a random key to named inputs.
      contenders: the implementations by name; OURS is checked, and compared with the others.
      error: maps (inputs, result of OURS) to its relative error against float64.
      tolerance: the largest error that counts as correct.
      flops: floating-point operations; 0 if the problem is limited by memory traffic.
      bytes: the least number of bytes that must be read from and written to global memory.
      search: what `--tune` compares, or None.
    """

    family: str
    name: str
    make: Callable[[jax.Array], dict[str, Any]]
    contenders: dict[str, Contender]
    error: Callable[[dict[str, Any], Any], float]
    tolerance: float
    flops: float = 0.0
    bytes: float = 0.0
    search: Search | None = None


def float64(q: pk.Quantized, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
    """Returns rows of a quantised matrix, dequantised in float64 by numpy."""
    values = np.asarray(q.values)[rows].astype("f8")
    scales = np.asarray(q.scales, "f8")
    if q.tile == "128x128":
        scales = np.repeat(scales, 128, 0)[: q.shape[0]]
    return values * np.repeat(scales[rows], 128, 1)[:, : values.shape[1]]


def some(count: int, seed: int = 0) -> np.ndarray:
    """Returns up to CHECKED_ROWS random indices below `count`, sorted."""
    return np.unique(np.random.default_rng(seed).integers(0, count, CHECKED_ROWS))


def relative(got: np.ndarray, wanted: np.ndarray) -> float:
    """Returns the relative error in the Frobenius norm."""
    return float(np.linalg.norm(np.asarray(got, "f8") - wanted) / np.linalg.norm(wanted))


def dense(m: int, n: int, k: int) -> Problem:
    """Returns the forward product: activations in 1x128 tiles by weights in 128x128 blocks."""

    def make(key):
        keys = jax.random.split(key)
        x, w = jax.random.normal(keys[0], (m, k), jnp.bfloat16), jax.random.normal(keys[1], (n, k), jnp.bfloat16)
        return {"x": x, "w": w, "a": pk.quantize(x, tile="1x128"), "b": pk.quantize(w, tile="128x128")}

    def error(inputs, out):
        rows = some(m)
        return relative(np.asarray(out)[rows], float64(inputs["a"], rows) @ float64(inputs["b"]).T)

    contenders = {
        OURS: Contender(pk.blockwise_matmul, ("a", "b")),
        "XLA bf16": Contender(lambda x, w: x @ w.T, ("x", "w")),
        "XLA FP8": Contender(_xla_fp8, ("a", "b")),
    }
    size = 2.0 * m * n * k, m * k + n * k + 2.0 * m * n
    return Problem("dense", f"{m} x {n} x {k}", make, contenders, error, 4e-3, *size, _search(m, n, k, False))


def weight_gradient(m: int, n: int, k: int) -> Problem:
    """Returns the weight gradient dW [n, k] += dYᵀ X over m tokens, accumulated in float32.

    Both operands are quantised in 1x128 tiles along the tokens.
    """

    def make(key):
        keys = jax.random.split(key, 3)
        y, x = jax.random.normal(keys[0], (n, m), jnp.bfloat16), jax.random.normal(keys[1], (k, m), jnp.bfloat16)
        quantized = {name: pk.quantize(v, tile="1x128") for name, v in (("a", y), ("b", x))}
        return {"y": y, "x": x, **quantized, "total": jax.random.normal(keys[2], (n, k))}

    def error(inputs, out):
        rows = some(n)
        wanted = np.asarray(inputs["total"], "f8")[rows] + float64(inputs["a"], rows) @ float64(inputs["b"]).T
        return relative(np.asarray(out)[rows], wanted)

    def add(a, b, total):
        return pk.blockwise_matmul(a, b, accumulator=total, out_dtype=jnp.float32)

    def add_bf16(y, x, total):
        return total + lax.dot_general(y, x, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)

    contenders = {OURS: Contender(add, ("a", "b", "total")), "XLA bf16": Contender(add_bf16, ("y", "x", "total"))}
    size = 2.0 * m * n * k, m * k + n * m + 8.0 * n * k
    name = f"{n} x {k} x {m}"
    return Problem("weight gradient", name, make, contenders, error, 1e-3, *size, _search(n, k, m, True))


def _search(m: int, n: int, k: int, accumulate: bool) -> Search:
    """Returns a search over every tiling of the blockwise product, each in three orders of the tiles."""
    dtype = jnp.float32 if accumulate else jnp.bfloat16
    cuts = tuple(
        dataclasses.replace(cut, raster_width=width)
        for cut in tuning.candidates(m, n, k, jnp.dtype(dtype).itemsize, accumulate, multiprocessors())
        for width in (4, 8, 16)
    )

    def function(cut, a, b, total=None):
        return hopper.matmul(a, b, total, dtype, tiling=cut)

    return Search(tuning, (m, n, k), cuts, ("a", "b", "total") if accumulate else ("a", "b"), function)


def _xla_fp8(a: pk.Quantized, b: pk.Quantized) -> jax.Array:
    """Computes cuBLAS's FP8 product through XLA: one scale per tensor, no promotion."""
    product = lax.dot_general(a.values, b.values, (((1,), (1,)), ((), ())), preferred_element_type=jnp.bfloat16)
    return product * jnp.bfloat16(0.5)


def quantize(m: int, k: int) -> Iterator[Problem]:
    """Yields the four quantisation kernels, each with the least number of bytes it must move."""

    def make(key):
        x = jax.random.normal(key, (m, k), jnp.bfloat16)
        return {"x": x, "q": pk.quantize(x, tile="1x128")}

    def error_along_rows(inputs, out):
        return relative(float64(out, rows := some(m)), np.asarray(inputs["x"][rows], "f8"))

    def error_of_both(inputs, out):
        columns = relative(float64(out[1], chosen := some(k)), np.asarray(inputs["x"][:, chosen], "f8").T)
        return max(error_along_rows(inputs, out[0]), columns)

    def error_again(inputs, out):
        return relative(float64(out, chosen := some(k)), np.asarray(inputs["x"][:, chosen], "f8").T)

    tiles, blocks = 4.0 * m * k / 128, 4.0 * m * k / 128**2
    for name, function, by_definition, argument, error, size in (
        ("1x128", *_one_format("1x128"), "x", error_along_rows, 3.0 * m * k + tiles),
        ("128x128", *_one_format("128x128"), "x", error_along_rows, 3.0 * m * k + blocks),
        ("both orientations", pk.quantize_both, plain(pk.quantize_both), "x", error_of_both, 4.0 * m * k + 2 * tiles),
        (
            "re-tiled, transposed",
            pk.requantize_transposed,
            plain(pk.requantize_transposed),
            "q",
            error_again,
            2.0 * m * k + 2 * tiles,
        ),
    ):
        contenders = {OURS: Contender(function, (argument,)), "plain XLA": Contender(by_definition, (argument,))}
        yield Problem("quantise", f"{name}, {m} x {k}", make, contenders, error, 0.06, bytes=size)


def _one_format(tile: Tile) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Returns quantisation in one kind of tile, by the best implementation and by the reference."""

    def function(x, implementation=None):
        return pk.quantize(x, tile=tile, implementation=implementation)

    return function, plain(function)


def plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `function` computed by its reference in jax.numpy, compiled by XLA."""
    return lambda *inputs: function(*inputs, implementation="reference")
