"""Times the matrix products: dense FP8, weight gradients, and both over groups of rows."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from cases import BFLOAT16, FP8_SUM, Case
from jax import lax
from timing import SAMPLED, Contender, Problem, timed_cases

import pallas_kernels as pk
from pallas_kernels.blockwise_matmul import hopper
from pallas_kernels.blockwise_matmul.tuning import Tiling, candidates
from pallas_kernels.device import target_platform
from pallas_kernels.hopper_launch import multiprocessors

# M, N, K of DeepGEMM's published table, with its TFLOP/s on an H800.
DENSE = (
    (4096, 2112, 7168, 1127),
    (4096, 24576, 1536, 1212),
    (4096, 32768, 512, 775),
    (4096, 7168, 16384, 1520),
    (4096, 4096, 7168, 1410),
    (4096, 7168, 2048, 1168),
    (64, 2112, 7168, 206),
    (64, 4096, 7168, 287),
)
MANY_ROWS = (
    Tiling(128, 128, 5, 2, "b"),
    Tiling(128, 192, 4, 2, "b"),
    Tiling(128, 160, 5, 2, "b"),
    Tiling(256, 96, 4, 2, "a"),
)
FEW_ROWS = (Tiling(64, 16, 12), Tiling(64, 64, 12, splits=4))
# Groups, rows of all groups, N, K, and the published TFLOP/s where there is one.
GROUPED = (
    (4, 32768, 4096, 7168, 1360),
    (4, 32768, 7168, 2048, 0),
    (8, 32768, 4096, 7168, 0),
    (32, 32768, 4096, 7168, 0),
)


def cases(tiny: bool, form: str) -> Iterator[Case]:
    """Yields the timings of a form: "ceilings", "dense", "weight gradient", "grouped", "grouped depth", "masked"."""
    if form == "ceilings":
        yield from timed_cases(copy(1 << 16 if tiny else 1 << 28))
        yield from timed_cases(bf16_product(128 if tiny else 8192))
    for m, n, k, published in ((64, 144, 160, 0),) if tiny else DENSE:
        if form == "dense":
            yield from timed_cases(dense(m, n, k, published))
        elif form == "weight gradient" and (m > 64 or tiny):
            yield from timed_cases(weight_gradient(n, k, m))
    for groups, rows, n, k, published in ((2, 256, 96, 160, 0),) if tiny else GROUPED:
        if form == "grouped":
            yield from timed_cases(grouped(groups, rows, n, k, published))
        elif form == "grouped depth":
            yield from timed_cases(grouped_depth(groups, rows, n, k))
    if form == "masked":
        yield from timed_cases(masked(*((2, 40, 96, 160) if tiny else (32, 128, 4096, 7168))))


def copy(count: int) -> Problem:
    make = lambda key: {"x": jax.random.normal(key, (count,), jnp.bfloat16)}  # noqa: E731
    return Problem("copy", make, {"XLA": Contender(lambda x: x + 1, ("x",))}, bytes=4.0 * count)


def bf16_product(size: int) -> Problem:
    make = lambda key: dict(zip("xy", jax.random.normal(key, (2, size, size), jnp.bfloat16), strict=True))  # noqa: E731
    contenders = {"XLA": Contender(jnp.matmul, ("x", "y"), tried=True)}
    return Problem(f"bf16 product {size}", make, contenders, flops=2.0 * size**3)


def dense(m: int, n: int, k: int, published: float) -> Problem:
    """Returns the forward product: activations in 1x128 tiles by weights in 128x128 blocks."""

    def make(key):
        x, w = random(key, (m, k), (n, k))
        return {"x": x, "w": w, "a": pk.quantize(x, tile="1x128"), "b": pk.quantize(w, tile="128x128")}

    def cut(a, b, tiling):
        return hopper.matmul(a, b, None, jnp.bfloat16, tiling=tiling)

    contenders = {
        "ours": Contender(pk.blockwise_matmul, ("a", "b"), exact, BFLOAT16 * 1.1),
        "XLA bf16": Contender(lambda x, w: x @ w.T, ("x", "w"), tried=True),
    }
    if target_platform() == "hopper":
        # What the estimate would choose next, and tiles of other forms.
        likely = candidates(m, n, k, 2, False, multiprocessors())[1:3]
        for tiling in dict.fromkeys([*likely, *(FEW_ROWS if m <= 64 else MANY_ROWS)]):
            contenders[tiling.words()] = Contender(functools.partial(cut, tiling=tiling), ("a", "b"))
    return Problem(f"{m} x {n} x {k}", make, contenders, 2.0 * m * n * k, m * k + n * k + 2.0 * m * n, published)


def weight_gradient(n: int, k: int, m: int) -> Problem:
    """Returns the weight gradient [n, k] over m tokens, added to float32. Both operands are in 1x128 tiles."""

    def make(key):
        y, x = random(key, (n, m), (k, m))
        total = jax.random.normal(key, (n, k))
        return {"y": y, "x": x, "a": pk.quantize(y, tile="1x128"), "b": pk.quantize(x, tile="1x128"), "total": total}

    def add(a, b, total):
        return pk.blockwise_matmul(a, b, accumulator=total, out_dtype=jnp.float32)

    def add_bf16(y, x, total):
        return total + lax.dot_general(y, x, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)

    contenders = {
        "ours": Contender(add, ("a", "b", "total"), lambda a, b, total: exact(a, b) + total[::SAMPLED], FP8_SUM),
        "XLA bf16": Contender(add_bf16, ("y", "x", "total"), tried=True),
    }
    return Problem(f"{n} x {k} over {m}", make, contenders, 2.0 * m * n * k, m * k + n * m + 8.0 * n * k)


def grouped(groups: int, rows: int, n: int, k: int, published: float) -> Problem:
    """Returns the rows of equal groups times the weights of their groups."""
    sizes = jnp.full((groups,), rows // groups, jnp.int32)

    def make(key):
        x, w = random(key, (rows, k), (groups, n, k))
        return {"x": x, "w": w, "a": pk.quantize(x, tile="1x128"), "b": pk.quantize(w, tile="128x128"), "sizes": sizes}

    def ours(a, b, sizes):
        return pk.grouped_matmul(a, b, sizes, row_alignment=128)

    def by_group(x, w):
        return jnp.einsum("gmk,gnk->gmn", x.reshape(groups, -1, k), w).reshape(rows, n)

    contenders = {
        "ours": Contender(ours, ("a", "b", "sizes")),
        "ours, bf16": Contender(ours, ("x", "w", "sizes")),
        "XLA bf16, equal groups": Contender(by_group, ("x", "w"), tried=True),
    }
    name = f"{groups} groups, {rows} x {n} x {k}"
    moved = rows * k + 1.0 * groups * n * k + 2.0 * rows * n
    return Problem(name, make, contenders, 2.0 * rows * n * k, moved, published)


def grouped_depth(groups: int, rows: int, n: int, k: int) -> Problem:
    """Returns the weight gradients of equal groups."""
    sizes = jnp.full((groups,), rows // groups, jnp.int32)

    def make(key):
        y, x = random(key, (n, rows), (k, rows))
        quantized = {"a": pk.quantize(y, tile="1x128"), "b": pk.quantize(x, tile="1x128")}
        return {"y": y.T, "x": x.T, **quantized, "sizes": sizes}

    def ours(a, b, sizes):
        return pk.grouped_weight_gradient(a, b, sizes, row_alignment=128)

    def by_group(y, x, sizes):
        y, x = (v.reshape(groups, -1, v.shape[1]) for v in (y, x))
        return jnp.einsum("gmn,gmk->gnk", y, x, preferred_element_type=jnp.float32)

    contenders = {
        "ours": Contender(ours, ("a", "b", "sizes")),
        "ours, bf16": Contender(ours, ("y", "x", "sizes")),
        "XLA bf16, equal groups": Contender(by_group, ("y", "x", "sizes"), tried=True),
    }
    name = f"{groups} groups, {n} x {k} over {rows}"
    return Problem(name, make, contenders, 2.0 * rows * n * k, rows * (n + k) + 4.0 * groups * n * k)


def masked(groups: int, capacity: int, n: int, k: int) -> Problem:
    """Returns the problem of decoding: a buffer of `capacity` rows per expert, of which about a tenth are filled."""
    counts = jnp.asarray(np.random.default_rng(0).binomial(capacity, 0.1, groups), jnp.int32)

    def make(key):
        x, w = random(key, (groups, capacity, k), (groups, n, k))
        quantized = {"a": pk.quantize(x, tile="1x128"), "b": pk.quantize(w, tile="128x128")}
        return {"x": x, "w": w, **quantized, "counts": counts}

    contenders = {
        "ours": Contender(pk.masked_grouped_matmul, ("a", "b", "counts")),
        "ours, bf16": Contender(pk.masked_grouped_matmul, ("x", "w", "counts")),
        "XLA bf16, all rows": Contender(lambda x, w: jnp.einsum("gmk,gnk->gmn", x, w), ("x", "w"), tried=True),
    }
    rows, moved = int(counts.sum()), 1.0 * groups * n * k + 2.0 * groups * capacity * n
    return Problem(f"{groups} groups of {capacity}, {rows} rows, {n} x {k}", make, contenders, 0.0, moved + rows * k)


def exact(a: pk.Quantized, b: pk.Quantized) -> jax.Array:
    """Returns rows [::SAMPLED] of the product of two quantised matrices in float32."""
    rows = pk.Quantized(a.values[::SAMPLED], a.scales[::SAMPLED], a.tile)
    dot = functools.partial(lax.dot_general, dimension_numbers=(((1,), (1,)), ((), ())))
    return dot(pk.dequantize(rows), pk.dequantize(b), precision=lax.Precision.HIGHEST)


def random(key: jax.Array, *shapes: tuple[int, ...]) -> list[jax.Array]:
    return [
        jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(jax.random.split(key, len(shapes)), shapes, strict=True)
    ]
