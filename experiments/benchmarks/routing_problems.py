"""Defines the routing problems that kernels.py measures: V3's gate, permuting tokens by expert, and combining."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from kernel_problems import OURS, Contender, Problem, plain, relative, some

import pallas_kernels as pk


def routing(tokens: int, width: int, experts: int = 256, chosen: int = 8) -> Iterator[Problem]:
    """Yields V3's gate, `permute` with and without alignment, and `combine` with its gradient."""
    settings = {"num_experts_per_tok": chosen, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5}

    def choose(implementation):
        return lambda logits, bias: pk.gate(logits[None], bias, **settings, implementation=implementation)

    def make(key):
        keys = jax.random.split(key, 4)
        logits, bias = jax.random.normal(keys[0], (tokens, experts)), 0.1 * jax.random.normal(keys[1], (experts,))
        index = jax.lax.top_k(logits, chosen)[1]
        x, bar = jax.random.normal(keys[2], (2, tokens, width), jnp.bfloat16)
        rows, permutation = pk.permute(x, index, experts)
        weights = jax.random.uniform(keys[3], (tokens, chosen))
        return {
            "logits": logits, "bias": bias, "index": index, "x": x, "rows": rows, "gate": weights, "order": permutation,
            "bar": bar,
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
        row_of = np.asarray(permutation.row_of_slot)
        sample = order[some(len(order))]
        return relative(np.asarray(rows, "f4")[row_of[sample]], x[sample // chosen])

    def combine_error(inputs, out):
        picked = some(tokens)
        row_of = np.asarray(inputs["order"].row_of_slot).reshape(tokens, chosen)[picked]
        rows, weights = np.asarray(inputs["rows"], "f8"), np.asarray(inputs["gate"], "f8")[picked]
        return relative(np.asarray(out)[picked], (rows[row_of] * weights[..., None]).sum(1))

    def permute(x, index, implementation=None):
        return pk.permute(x, index, experts, implementation=implementation)

    def combine(rows, weights, order, implementation=None):
        return pk.combine(rows, weights, order, implementation=implementation)

    def permute_padded(x, index, implementation=None):
        return pk.permute(x, index, experts, row_alignment=128, implementation=implementation)

    def gradient(rows, weights, order, bar, implementation=None):
        """Computes the gradients of `combine` by rows and gates. (The gradient of `permute` is `combine`.)"""
        _, pull = jax.vjp(lambda rows, weights: combine(rows, weights, order, implementation), rows, weights)
        return pull(bar)

    def gradient_error(inputs, out):
        picked = some(tokens)
        row_of = np.asarray(inputs["order"].row_of_slot).reshape(tokens, chosen)[picked]
        bar = np.asarray(inputs["bar"], "f8")[picked, None]
        wanted = np.asarray(inputs["gate"], "f8")[picked][..., None] * bar
        to_gates = (np.asarray(inputs["rows"], "f8")[row_of] * bar).sum(-1)
        return max(relative(np.asarray(out[0])[row_of], wanted), relative(np.asarray(out[1])[picked], to_gates))

    padded = tokens * chosen + min(experts, tokens * chosen) * 127  # at most this many rows, padding included
    moved = 2.0 * tokens * width * (1 + chosen)
    for name, ours, inputs, error, tolerance, size in (
        ("permute", permute, ("x", "index"), permute_error, 1e-7, moved),
        ("permute to 128s", permute_padded, ("x", "index"), permute_error, 1e-7, 2.0 * width * (tokens + padded)),
        ("combine", combine, ("rows", "gate", "order"), combine_error, 4e-3, moved),
        (
            "gradient of combine",
            gradient,
            ("rows", "gate", "order", "bar"),
            gradient_error,
            4e-3,
            2.0 * tokens * width * (1 + 2 * chosen),
        ),
    ):
        contenders = {OURS: Contender(ours, inputs), "plain XLA": Contender(plain(ours), inputs)}
        yield Problem("routing", f"{name}, {tokens} x {width}", make, contenders, error, tolerance, bytes=size)
    contenders = {
        OURS: Contender(choose(None), ("logits", "bias")),
        "plain XLA": Contender(choose("reference"), ("logits", "bias")),
    }
    size = 4.0 * tokens * experts + 8.0 * tokens * chosen
    yield Problem("routing", f"gate, {tokens} x {experts}", make, contenders, gate_error, 1e-5, bytes=size)
