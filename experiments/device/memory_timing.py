"""Times what memory traffic limits: quantisation, permutation and combination, and the gates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from cases import Case
from timing import Contender, Problem, timed_cases

import pallas_kernels as pk


def cases(tiny: bool, form: str) -> Iterator[Case]:
    """Yields the timings of a form: "quantise" (RMSNorms too), "rows" or "gate"."""
    if form == "quantise":
        for m, k in ((200, 256),) if tiny else ((4096, 7168), (32768, 2048)):
            for problem in (*quantise(m, k), *rms_norm(m, k)):
                yield from timed_cases(problem)
    elif form == "rows":
        for problem in rows(*((64, 256, 16, 2) if tiny else (8192, 7168, 256, 8))):
            yield from timed_cases(problem)
    else:
        yield from timed_cases(gate(32 if tiny else 16384))


def contenders(function: Callable[..., Any], inputs: tuple[str, ...]) -> dict[str, Contender]:
    """Returns a public function by its kernel and by its reference, which XLA compiles."""
    by_definition = lambda *given: function(*given, implementation="reference")  # noqa: E731
    return {"ours": Contender(function, inputs), "XLA": Contender(by_definition, inputs)}


def quantise(m: int, k: int) -> Iterator[Problem]:
    def make(key):
        x = jax.random.normal(key, (m, k), jnp.bfloat16)
        return {"x": x, "q": pk.quantize(x, tile="1x128")}

    def of(tile):
        return lambda x, implementation=None: pk.quantize(x, tile=tile, implementation=implementation)

    tiles, blocks = 4.0 * m * k / 128, 4.0 * m * k / 128**2
    for name, function, argument, moved in (
        ("1x128", of("1x128"), "x", 3.0 * m * k + tiles),
        ("128x128", of("128x128"), "x", 3.0 * m * k + blocks),
        ("both", pk.quantize_both, "x", 4.0 * m * k + 2 * tiles),
        ("again, transposed", pk.requantize_transposed, "q", 2.0 * m * k + 2 * tiles),
    ):
        yield Problem(f"{name}, {m} x {k}", make, contenders(function, (argument,)), bytes=moved)


def rms_norm(m: int, k: int) -> Iterator[Problem]:
    def make(key):
        x, bar = jax.random.normal(key, (2, m, k), jnp.bfloat16)
        weight = jax.random.normal(key, (k,))
        _, reciprocal, _ = pk.quantize_rms_norm(x, weight, epsilon=1e-6)
        return {"x": x, "weight": weight, "reciprocal": reciprocal, "bar": bar}

    def forward(x, weight, implementation=None):
        return pk.quantize_rms_norm(x, weight, epsilon=1e-6, implementation=implementation)[:2]

    moved = 5.0 * m * k + 4.0 * m * k / 128  # x twice: the mean squares are XLA's
    yield Problem(f"RMSNorm, {m} x {k}", make, contenders(forward, ("x", "weight")), bytes=moved)

    def gradient(x, weight, reciprocal, bar, implementation=None):
        return pk.rms_norm_gradient(x, weight, reciprocal, bar, plus=bar, implementation=implementation)

    inputs = ("x", "weight", "reciprocal", "bar")
    yield Problem(f"gradient of RMSNorm, {m} x {k}", make, contenders(gradient, inputs), bytes=8.0 * m * k)


def rows(tokens: int, width: int, experts: int, chosen: int) -> Iterator[Problem]:
    def make(key):
        keys = jax.random.split(key, 4)
        index = jax.lax.top_k(jax.random.normal(keys[0], (tokens, experts)), chosen)[1]
        x, bar = jax.random.normal(keys[1], (2, tokens, width), jnp.bfloat16)
        _, order = pk.permute(x, index, experts)
        moved = jax.random.normal(keys[2], (tokens * chosen, width), jnp.bfloat16)
        weights = jax.random.uniform(keys[3], (tokens, chosen))
        return {"x": x, "index": index, "rows": moved, "gates": weights, "order": order, "bar": bar}

    def permute(alignment):
        return lambda x, index, implementation=None: pk.permute(
            x, index, experts, row_alignment=alignment, implementation=implementation
        )[0]

    def gradient(rows, gates, order, bar, implementation=None):
        def function(rows, gates):
            return pk.combine(rows, gates, order, implementation=implementation)

        return jax.vjp(function, rows, gates)[1](bar)

    moved = 2.0 * tokens * width * (1 + chosen)
    padded = tokens * chosen + min(experts, tokens * chosen) * 127
    of = f"{tokens} x {width}"
    yield Problem(f"permute, {of}", make, contenders(permute(1), ("x", "index")), bytes=moved)
    size = 2.0 * width * (tokens + padded)
    yield Problem(f"permute to 128s, {of}", make, contenders(permute(128), ("x", "index")), bytes=size)
    yield Problem(f"combine, {of}", make, contenders(pk.combine, ("rows", "gates", "order")), bytes=moved)
    size = 2.0 * tokens * width * (1 + 2 * chosen)
    inputs = ("rows", "gates", "order", "bar")
    yield Problem(f"gradient of combine, {of}", make, contenders(gradient, inputs), bytes=size)


def gate(tokens: int, experts: int = 256) -> Problem:
    settings = {"num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5}

    def make(key):
        return {
            "logits": jax.random.normal(key, (1, tokens, experts)),
            "bias": 0.1 * jax.random.normal(key, (experts,)),
        }

    def choose(logits, bias, implementation=None):
        return pk.gate(logits, bias, **settings, implementation=implementation)

    moved = 4.0 * tokens * experts + 8.0 * tokens * 8
    return Problem(f"gate of V3, {tokens} tokens", make, contenders(choose, ("logits", "bias")), bytes=moved)
