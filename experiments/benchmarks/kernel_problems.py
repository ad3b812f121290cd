"""What kernels.py measures: for each operation its inputs, its contenders, an independent check and its size."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import pallas_kernels as pk
from pallas_kernels.quantize.quantized import Tile

OURS = "this project"
CHECKED_ROWS = 48


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to compute it: a function to jit, and which of the problem's inputs it takes."""

    function: Callable[..., Any]
    inputs: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Problem:
    """One row of the table.

    Attributes:
      family: dense, weight gradient, grouped, masked, quantise or routing.
      make: random key to named inputs.
      contenders: by name; OURS is checked and compared with the others.
      error: (inputs, result of OURS) to the relative error against float64, or to the share of wrong results.
      tolerance: of that error.
      flops: 0 where bytes are what counts.
      bytes: least traffic with global memory.
      tuning: what `--tune` needs to know: ("blockwise", M, N, K, bytes of an output), or None.
    """

    family: str
    name: str
    make: Callable[[jax.Array], dict[str, Any]]
    contenders: dict[str, Contender]
    error: Callable[[dict[str, Any], Any], float]
    tolerance: float
    flops: float = 0.0
    bytes: float = 0.0
    tuning: tuple[Any, ...] | None = None


def float64(q: pk.Quantized, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
    """Rows of a quantised matrix in float64, by numpy."""
    values = np.asarray(q.values)[rows].astype("f8")
    scales = np.asarray(q.scales, "f8")
    if q.tile == "128x128":
        scales = np.repeat(scales, 128, 0)[: q.shape[0]]
    return values * np.repeat(scales[rows], 128, 1)[:, : values.shape[1]]


def some(count: int, seed: int = 0) -> np.ndarray:
    return np.unique(np.random.default_rng(seed).integers(0, count, CHECKED_ROWS))


def relative(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(got, "f8") - wanted) / np.linalg.norm(wanted))


def dense(m: int, n: int, k: int) -> Problem:
    """Forward: activations in 1x128 tiles, weights in 128x128 blocks."""

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
    return Problem("dense", f"{m} x {n} x {k}", make, contenders, error, 4e-3, *size, ("blockwise", m, n, k, 2))


def weight_gradient(m: int, n: int, k: int) -> Problem:
    """dW [n, k] += dYᵀ X over m tokens: both operands in 1x128 tiles along the tokens, float32 added to."""

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
    return Problem(
        "weight gradient", f"{n} x {k} x {m}", make, contenders, error, 1e-3, *size, ("blockwise", n, k, m, 4)
    )


def _xla_fp8(a: pk.Quantized, b: pk.Quantized) -> jax.Array:
    """cuBLAS's FP8 product as XLA calls it: one scale a tensor, no promotion."""
    product = lax.dot_general(a.values, b.values, (((1,), (1,)), ((), ())), preferred_element_type=jnp.bfloat16)
    return product * jnp.bfloat16(0.5)


def quantise(m: int, k: int) -> Iterator[Problem]:
    """The four ways, with the least bytes each can move."""

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
    for name, function, plain, argument, error, size in (
        ("1x128", *_one_format("1x128"), "x", error_along_rows, 3.0 * m * k + tiles),
        ("128x128", *_one_format("128x128"), "x", error_along_rows, 3.0 * m * k + blocks),
        ("both orientations", pk.quantize_both, _plain(pk.quantize_both), "x", error_of_both, 4.0 * m * k + 2 * tiles),
        (
            "re-tiled, transposed",
            pk.requantize_transposed,
            _plain(pk.requantize_transposed),
            "q",
            error_again,
            2.0 * m * k + 2 * tiles,
        ),
    ):
        contenders = {OURS: Contender(function, (argument,)), "plain XLA": Contender(plain, (argument,))}
        yield Problem("quantise", f"{name}, {m} x {k}", make, contenders, error, 0.06, bytes=size)


def _one_format(tile: Tile) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Quantisation in one kind of tile: the best implementation, and the plain one."""

    def function(x, implementation=None):
        return pk.quantize(x, tile=tile, implementation=implementation)

    return function, _plain(function)


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` through the definition in jax.numpy, compiled by XLA."""
    return lambda *inputs: function(*inputs, implementation="reference")


def group_sizes(rows: int, groups: int, skewed: bool) -> np.ndarray:
    """Multiples of 128 that add up to `rows`: even, or falling off as 1/rank with some groups empty."""
    weights = 1 / np.arange(1, groups + 1) if skewed else np.ones(groups)
    tiles = np.floor(weights / weights.sum() * (rows // 128)).astype(int)
    tiles[0] += rows // 128 - tiles.sum()
    return (tiles * 128).astype("i4")


def grouped(rows: int, groups: int, n: int, k: int, skewed: bool) -> Problem:
    """Rows contiguous by expert."""
    sizes = group_sizes(rows, groups, skewed)

    def make(key):
        keys = jax.random.split(key)
        x, w = (
            jax.random.normal(keys[0], (rows, k), jnp.bfloat16),
            jax.random.normal(keys[1], (groups, n, k), jnp.bfloat16),
        )
        quantized = {"a": pk.quantize(x, tile="1x128"), "b": pk.quantize(w, tile="128x128")}
        return {"x": x, "w": w, "wt": jnp.swapaxes(w, 1, 2), **quantized, "sizes": jnp.asarray(sizes)}

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
        "lax.ragged_dot bf16": Contender(lax.ragged_dot, ("x", "wt", "sizes")),
    }
    if tokamax := _tokamax():
        contenders["tokamax bf16"] = Contender(tokamax.ragged_dot, ("x", "wt", "sizes"))
    name = f"{groups} groups, {'skewed' if skewed else 'even'}, {rows} x {n} x {k}"
    used = int((sizes > 0).sum())
    size = 2.0 * rows * n * k, rows * k + 1.0 * used * n * k + 2.0 * rows * n
    return Problem("grouped", name, make, contenders, error, 4e-3, *size)


def _tokamax() -> Any:
    try:
        import tokamax  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    return tokamax


def routing(tokens: int, width: int, experts: int = 256, chosen: int = 8) -> Iterator[Problem]:
    """V3's gate, and the way to expert order and back."""
    settings = {"num_experts_per_tok": chosen, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5}

    def choose(implementation):
        return lambda logits, bias: pk.gate(logits[None], bias, **settings, implementation=implementation)

    def make(key):
        keys = jax.random.split(key, 4)
        logits, bias = jax.random.normal(keys[0], (tokens, experts)), 0.1 * jax.random.normal(keys[1], (experts,))
        index = jax.lax.top_k(logits, chosen)[1]
        x = jax.random.normal(keys[2], (tokens, width), jnp.bfloat16)
        rows, permutation = pk.permute(x, index, experts)
        weights = jax.random.uniform(keys[3], (tokens, chosen))
        return {
            "logits": logits, "bias": bias, "index": index, "x": x, "rows": rows, "gate": weights, "order": permutation,
        }  # fmt: skip

    def gate_error(inputs, out):
        picked = some(tokens)
        scores = 1 / (1 + np.exp(-np.asarray(inputs["logits"], "f8")[picked]))
        biased = (scores + np.asarray(inputs["bias"], "f8")).reshape(len(picked), 8, -1)
        group = np.sort(biased, -1)[..., -2:].sum(-1)
        cut = np.sort(group, -1)[:, -4][:, None, None]
        kept = np.where(group[..., None] >= cut, biased, -np.inf).reshape(len(picked), -1)
        index = np.argsort(-kept, 1, kind="stable")[:, :chosen]
        weights = np.take_along_axis(scores, index, 1)
        weights = 2.5 * weights / weights.sum(1, keepdims=True)
        return relative(np.sort(np.asarray(out.gate)[0, picked], 1), np.sort(weights, 1))

    def permute_error(inputs, out):
        rows, permutation = out
        x, index = np.asarray(inputs["x"], "f4"), np.asarray(inputs["index"]).reshape(-1)
        order = np.argsort(index, kind="stable")
        place = np.asarray(permutation.row_of_slot)
        sample = order[some(len(order))]
        return relative(np.asarray(rows, "f4")[place[sample]], x[sample // chosen])

    def combine_error(inputs, out):
        picked = some(tokens)
        place = np.asarray(inputs["order"].row_of_slot).reshape(tokens, chosen)[picked]
        rows, weights = np.asarray(inputs["rows"], "f8"), np.asarray(inputs["gate"], "f8")[picked]
        return relative(np.asarray(out)[picked], (rows[place] * weights[..., None]).sum(1))

    def permute(x, index, implementation=None):
        return pk.permute(x, index, experts, implementation=implementation)

    def combine(rows, weights, order, implementation=None):
        return pk.combine(rows, weights, order, implementation=implementation)

    moved = 2.0 * tokens * width * (1 + chosen)
    for name, ours, plain, inputs, error, tolerance, size in (
        ("gate", choose(None), choose("reference"), ("logits", "bias"), gate_error, 1e-5, 4.0 * tokens * experts),
        ("permute", permute, _plain(permute), ("x", "index"), permute_error, 1e-7, moved),
        ("combine", combine, _plain(combine), ("rows", "gate", "order"), combine_error, 4e-3, moved),
    ):
        contenders = {OURS: Contender(ours, inputs), "plain XLA": Contender(plain, inputs)}
        yield Problem("routing", f"{name}, {tokens} x {width}", make, contenders, error, tolerance, bytes=size)
