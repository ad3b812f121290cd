"""Checks gates, permutation and combination against float64."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import numpy as np
from cases import BFLOAT16, FLOAT32_SUM, Case, error_case, normal, repeated, row_error, same_bits

import pallas_kernels as pk

# Name, experts, bias, and the settings of `pallas_kernels.gate`.
ROUTERS = (
    ("V3", 256, True, {"num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5}),
    ("V2-Lite", 64, False, {"num_experts_per_tok": 6, "scoring_func": "softmax", "norm_topk_prob": False}),
    ("Kimi K2", 384, True, {"num_experts_per_tok": 8, "routed_scaling_factor": 2.827}),
    ("V2", 160, False, {
        "num_experts_per_tok": 6, "n_group": 8, "topk_group": 3, "scoring_func": "softmax", "group_score": "max",
        "norm_topk_prob": False, "routed_scaling_factor": 16.0,
    }),
)  # fmt: skip
NEAR = 1e-5  # affinities closer than this may be ordered either way in float32


def cases(tiny: bool, form: str) -> Iterator[Case]:
    """Yields cases of a form: "gates", or a dtype for moving rows."""
    if form == "gates":
        for name, experts, biased, settings in ROUTERS[1:2] if tiny else ROUTERS:
            for masked in (False, True):
                shape = (2, 20 if tiny else 5000, experts)
                yield gate_case(f"{name}{', some tokens masked' * masked}", shape, biased, masked, settings)
        return
    # Tokens, experts per token, width, experts.
    shapes = (
        ((20, 2, 256, 4),) if tiny else ((1000, 8, 7168, 64), (3000, 8, 512, 256), (1001, 6, 2048, 64), (10, 2, 768, 4))
    )
    for tokens, chosen, width, experts in shapes:
        for alignment in (1, 128) if not tiny else (1,):
            yield from moves(tokens, chosen, width, experts, alignment, form)


def gate_case(name: str, shape: tuple[int, int, int], biased: bool, masked: bool, settings: dict) -> Case:
    """Returns the case of one router: its choices, gates, loads and both balance statistics."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal(shape, "f4")
    bias = rng.standard_normal(shape[-1], "f4") * np.float32(0.1) if biased else None
    mask = rng.random(shape[:2]) < 0.9 if masked else None

    def run() -> dict:
        def function(logits, bias, mask):
            return pk.gate(logits, bias, token_mask=mask, **settings)

        results = repeated(function, (logits, bias, mask))
        got = results[0]
        scores, order, margin = oracle(logits, bias, settings)
        chosen = settings["num_experts_per_tok"]
        clear = margin > NEAR
        wrong = int((np.asarray(got.expert_index) != order[..., :chosen])[clear].any(-1).sum())
        gates = np.take_along_axis(scores, np.asarray(got.expert_index), -1)
        if settings.get("norm_topk_prob", True):
            gates = gates / gates.sum(-1, keepdims=True)
        gate_error = float(np.max(np.abs(got.gate / (gates * settings.get("routed_scaling_factor", 1.0)) - 1)))
        counted = np.ones(shape[:2], bool) if mask is None else mask
        load = np.bincount(np.asarray(got.expert_index)[counted].reshape(-1), minlength=shape[-1])
        wrong_loads = int((load != got.load).sum())
        shares = scores / scores.sum(-1, keepdims=True) * counted[..., None]
        mean = shares.sum(1) / counted.sum(1)[:, None]
        free = np.argsort(-scores, -1, kind="stable")[..., :chosen]
        hits = np.stack(
            [np.bincount(f[c].reshape(-1), minlength=shape[-1]) for f, c in zip(free, counted, strict=True)]
        )
        fraction = got.selection_fraction * chosen * counted.sum(1)[:, None] / shape[-1]
        off = float(np.abs(fraction - hits).sum())  # assignments counted at another expert than in float64
        mean_error = row_error(got.affinity_mean, mean)
        unequal = sum(not same_bits(got, other) for other in results[1:])
        error, few = max(gate_error, mean_error), 1e-3 * hits.sum()
        passed = not wrong and not wrong_loads and error <= FLOAT32_SUM and off <= few and not unequal
        return {
            "passed": bool(passed and clear.mean() > 0.9), "error": error, "tolerance": FLOAT32_SUM, "wrong": wrong,
            "wrong_loads": wrong_loads, "unclear": float(1 - clear.mean()), "off": off, "unequal_runs": unequal,
        }  # fmt: skip

    return Case(name, run)


def oracle(logits: np.ndarray, bias: np.ndarray | None, settings: dict):
    """Returns affinities, experts best first, and how close the closest decision about each token was, in float64."""
    x = logits.astype("f8")
    scores = 1 / (1 + np.exp(-x))
    if settings.get("scoring_func") == "softmax":
        powers = np.exp(x - x.max(-1, keepdims=True))
        scores = powers / powers.sum(-1, keepdims=True)
    biased = scores if bias is None else scores + bias.astype("f8")
    groups, kept = settings.get("n_group", 1), settings.get("topk_group", 1)
    grouped = biased.reshape(*biased.shape[:-1], groups, -1)
    margin = np.full(biased.shape[:-1], np.inf)
    if groups > 1:
        descending = -np.sort(-grouped, -1)
        group_scores = descending[..., 0] if settings.get("group_score") == "max" else descending[..., :2].sum(-1)
        ranked = np.argsort(-group_scores, -1, kind="stable")
        ordered = np.take_along_axis(group_scores, ranked, -1)
        margin = ordered[..., kept - 1] - ordered[..., kept]
        allowed = np.zeros(group_scores.shape, bool)
        np.put_along_axis(allowed, ranked[..., :kept], True, -1)
        biased = np.where(allowed[..., None], grouped, -np.inf).reshape(biased.shape)
    order = np.argsort(-biased, -1, kind="stable")
    top = np.take_along_axis(biased, order[..., : settings["num_experts_per_tok"] + 1], -1)
    margin = np.minimum(margin, (top[..., :-1] - top[..., 1:]).min(-1))
    # Softmax scores are about 1/experts, and so are their rounding errors.
    return scores, order, margin * (logits.shape[-1] if settings.get("scoring_func") == "softmax" else 1)


def moves(tokens: int, chosen: int, width: int, experts: int, alignment: int, dtype: str) -> Iterator[Case]:
    """Yields `permute` and `combine` and the gradients of both."""
    name = f"{tokens} x {width}, {chosen} of {experts}, aligned to {alignment}"
    tolerance = BFLOAT16 if dtype == "bfloat16" else FLOAT32_SUM
    x, index = normal(tokens, width, dtype=dtype), choices(tokens, chosen, experts)
    row_of_slot, slot_of_row, sizes = order_of(index, experts, alignment)
    rows, bar = normal(len(slot_of_row), width, seed=1, dtype=dtype), normal(tokens, width, seed=2, dtype=dtype)
    gates = np.random.default_rng(3).random((tokens, chosen), "f4")
    permutation = pk.Permutation(row_of_slot, slot_of_row, sizes)  # pyright: ignore[reportArgumentType]

    def permute(x, index):
        moved, order = pk.permute(x, index, experts, row_alignment=alignment)
        return moved, order.row_of_slot, order.slot_of_row, order.group_sizes

    def moved() -> np.ndarray:
        padded = np.concatenate([x, np.zeros((1, width), x.dtype)])
        return padded[np.minimum(slot_of_row // chosen, tokens)]

    yield error_case(f"permute, {name}", permute, (x, index), lambda: (moved(), row_of_slot, slot_of_row, sizes), 0)

    def gradient(x, index, rows):
        return jax.vjp(lambda x: pk.permute(x, index, experts, row_alignment=alignment)[0], x)[1](rows)[0]

    def gathered() -> np.ndarray:
        return rows.astype("f8")[row_of_slot].reshape(tokens, chosen, width)

    yield error_case(f"gradient of permute, {name}", gradient, (x, index, rows), lambda: gathered().sum(1), tolerance)
    yield error_case(
        f"combine, {name}", pk.combine, (rows, gates, permutation),
        lambda: (gathered() * gates[..., None]).sum(1), tolerance,
    )  # fmt: skip

    def combine_gradient(rows, gates, permutation, bar):
        return jax.vjp(lambda rows, gates: pk.combine(rows, gates, permutation), rows, gates)[1](bar)

    def gradients():
        wide = bar.astype("f8")[:, None]
        to_rows = np.zeros((len(slot_of_row), width))
        to_rows[row_of_slot] = (wide * gates[..., None]).reshape(-1, width)
        return to_rows, (gathered() * wide).sum(-1)

    yield error_case(
        f"gradient of combine, {name}", combine_gradient, (rows, gates, permutation, bar), gradients,
        (1.2 * tolerance, 1e-4),
    )  # fmt: skip


@functools.cache
def choices(tokens: int, chosen: int, experts: int) -> np.ndarray:
    return np.argsort(np.random.default_rng(4).random((tokens, experts)), -1)[:, :chosen].astype("i4")


def order_of(index: np.ndarray, experts: int, alignment: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns row_of_slot, slot_of_row and group_sizes of `Permutation`, by a stable sort."""
    keys = index.reshape(-1)
    slots = len(keys)
    counts = np.bincount(keys, minlength=experts)
    sizes = -(-counts // alignment) * alignment
    rows = -(-(slots + min(experts, slots) * (alignment - 1)) // alignment) * alignment
    starts = np.cumsum(sizes) - sizes
    slot_of_row, row_of_slot = np.full(rows, slots, "i4"), np.zeros(slots, "i4")
    for expert in range(experts):
        mine = np.flatnonzero(keys == expert)
        row_of_slot[mine] = starts[expert] + np.arange(len(mine))
    slot_of_row[row_of_slot] = np.arange(slots)
    return row_of_slot, slot_of_row, sizes.astype("i4")
