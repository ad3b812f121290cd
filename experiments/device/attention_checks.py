"""Checks attention against float64: segments, ragged lengths, several widths, more tiles than multiprocessors."""

from __future__ import annotations

import importlib
import pathlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cases import BFLOAT16, Case, error_case, normal

import pallas_kernels as pk
from pallas_kernels.latent_attention import hopper_forward
from pallas_kernels.latent_attention.operands import Operands

# Weights are rounded to bfloat16 before they multiply the values, and the result is rounded once more.
ATTENDED = 2 * BFLOAT16
LOG_SUMS = 1e-5
GRADIENTS = 3 * BFLOAT16  # of all positions of a head: gradients of logits are differences, which cancel in some rows


def cases(tiny: bool, form: str) -> Iterator[Case]:
    if form == "decode":
        yield from decode_cases(tiny)
        return
    # batch, length, heads, widths of own keys, shared keys and values, segments, causal
    sizes = [
        (1, 1024, 4, 128, 64, 128, 0, True),
        (1, 1024, 4, 128, 64, 128, 5, True),
        (2, 600, 48, 128, 64, 128, 0, True),
        (2, 597, 3, 192, 0, 128, 4, True),
        (1, 300, 2, 64, 0, 64, 3, True),
        (2, 1001, 3, 64, 0, 64, 0, False),
        (1, 200, 2, 48, 16, 80, 3, False),
    ]
    if tiny:
        complete_interpreter()
        sizes = [(1, 140 if form == "forward" else 60, 1, 16, 16, 16, 2, True)]
    for size in sizes:
        yield (forward if form == "forward" else gradients)(*size)


def decode_cases(tiny: bool) -> Iterator[Case]:
    # tokens, heads, widths of latents and rotary keys, page, last positions of the sequences
    lengths = (-1, 0, 1, 62, 63, 64, 700, 4095)
    sizes = [
        (1, 128, 512, 64, 64, lengths),
        (2, 16, 512, 64, 16, lengths),
        (4, 128, 512, 64, 128, lengths[3:]),
        (1, 16, 128, 32, 8, lengths),
    ]
    if tiny:
        complete_interpreter()
        sizes = [(1, 2, 32, 16, 8, (-1, 20))]
    for size in sizes:
        yield decode(*size)
    for size in sizes if not tiny else [(1, 2, 64, 16, 8, (-1, 20))]:
        yield decode(*size, fp8=True)


def decode(
    tokens: int, heads: int, width: int, rope: int, page: int, lengths: tuple[int, ...], *, fp8: bool = False
) -> Case:
    """Returns absorbed decoding; sequences share a page, and pages after the last position do not exist."""
    batch, each, scale = len(lengths), max(lengths) // page + 1, 0.05
    positions = np.maximum(np.asarray(lengths)[:, None] - np.arange(tokens)[::-1], -1).astype("i4")
    pages = batch * each
    table = np.random.default_rng(6).permutation(pages).reshape(batch, each).astype("i4")
    table[:, 0] = table[0, 0]
    for row, last in zip(table, lengths, strict=True):
        row[(last + page) // page :] = pages
    queries = normal(batch, tokens, heads, width, seed=1), normal(batch, tokens, heads, rope, seed=2)
    latents, rope_keys = normal(pages, page, width, seed=3), normal(pages, page, rope, seed=4)
    scales: tuple[np.ndarray, ...] = ()
    if fp8:
        latents = latents.astype(jnp.float8_e4m3fn)
        scales = (np.exp(np.random.default_rng(5).uniform(-2, 1, latents.shape[:2])).astype("f4"),)

    def wanted() -> np.ndarray:
        values = np.asarray(latents, "f8") * (np.asarray(scales[0], "f8")[..., None] if fp8 else 1)
        keys = np.concatenate([values, np.asarray(rope_keys, "f8")], axis=-1)
        q = np.concatenate([np.asarray(x, "f8") for x in queries], axis=-1)
        out = np.zeros(queries[0].shape)
        for b, t in np.ndindex(batch, tokens):
            if seen := int(positions[b, t]) + 1:
                used = keys[table[b, : -(-seen // page)]].reshape(-1, width + rope)[:seen]
                logits = scale * q[b, t] @ used.T
                weights = np.exp(logits - logits.max(-1, keepdims=True))
                out[b, t] = weights @ used[:, :width] / weights.sum(-1, keepdims=True)
        return out

    def function(q_latent, q_rope, latents, rope_keys, table, positions, scales=None):
        return pk.latent_decode(q_latent, q_rope, latents, rope_keys, table, positions, scale=scale, scales=scales)

    name = f"decode {tokens} tokens, {heads} heads, {width} + {rope}, pages of {page}{', FP8' * fp8}"
    return error_case(name, function, (*queries, latents, rope_keys, table, positions, *scales), wanted, ATTENDED)


def complete_interpreter() -> None:
    """Adds to jax's interpreter what these kernels need: `tests/pallas_kernels/interpreted.py` does."""
    tests = pathlib.Path(__file__).parents[2] / "tests" / "pallas_kernels"
    if str(tests) not in sys.path:
        sys.path.append(str(tests))
    importlib.import_module("interpreted")


def forward(
    batch: int, length: int, heads: int, own: int, shared: int, value: int, segments: int, causal: bool
) -> Case:
    inputs = operands(batch, length, heads, own, shared, value, segments)
    scale = (own + shared) ** -0.5
    name = f"forward {batch} x {length}, {heads} heads, {own} + {shared} and {value}, {segments} segments"
    return error_case(
        name + ", causal" * causal,
        lambda *x: by_head(*hopper_forward.forward(Operands(*x), scale, causal)),
        inputs,
        lambda: attention(*inputs, scale=scale, causal=causal)[:2],
        (ATTENDED, LOG_SUMS),
    )


def by_head(attended, log_sums):
    """Puts the heads before the positions: columns of a matrix are then compared over all positions."""
    return attended.transpose(0, 2, 1, 3), log_sums


def gradients(
    batch: int, length: int, heads: int, own: int, shared: int, value: int, segments: int, causal: bool
) -> Case:
    """Returns the gradients of the public function."""
    *inputs, ids = operands(batch, length, heads, own, shared, value, segments)
    bar, scale = normal(batch, length, heads, value, seed=4), (own + shared) ** -0.5

    def function(q, k, v, k_shared, ids, bar):
        def attend(q, k, v, k_shared=None):
            return pk.latent_attention(q, k, v, k_shared=k_shared, scale=scale, segment_ids=ids, causal=causal)

        return vectors(jax.vjp(attend, *(x for x in (q, k, v, k_shared) if x is not None))[1](bar))

    name = f"gradients {batch} x {length}, {heads} heads, {own} + {shared} and {value}, {segments} segments"
    return error_case(
        name + ", causal" * causal,
        function,
        (*inputs, ids, bar),
        lambda: vectors(float64_gradients(*inputs, ids=ids, bar=bar, scale=scale, causal=causal)),
        GRADIENTS,
    )


def vectors(gradients: Iterable[Any]) -> list[Any]:
    """Returns a vector for each head of each gradient, and one for a gradient without heads."""
    return [
        x.reshape(-1)
        for gradient in gradients
        for x in ([gradient] if gradient.ndim == 3 else [gradient[:, :, head] for head in range(gradient.shape[2])])
    ]


def float64_gradients(q, k, v, k_shared, ids, bar, scale: float, causal: bool) -> list[np.ndarray]:
    """Returns the gradients of q, k, v and, if there is one, k_shared."""
    out, _, weights = attention(q, k, v, k_shared, ids, scale, causal)
    q, k, v, bar = (np.asarray(x, "f8").transpose(0, 2, 1, 3) for x in (q, k, v, bar))
    own = k.shape[-1]
    if k_shared is not None:
        k = with_shared(k, k_shared)
    weights_bar = bar @ v.swapaxes(2, 3)
    logits_bar = scale * weights * (weights_bar - (out * bar).sum(-1, keepdims=True))
    to_k = logits_bar.swapaxes(2, 3) @ q
    to = [logits_bar @ k, to_k[..., :own], weights.swapaxes(2, 3) @ bar]
    to = [x.transpose(0, 2, 1, 3) for x in to]
    return to if k_shared is None else [*to, to_k[..., own:].sum(1)]


def with_shared(k, k_shared) -> np.ndarray:
    """Returns the keys of all heads, [batch, heads, positions, width], with the shared part repeated."""
    rotary = np.broadcast_to(np.asarray(k_shared, "f8")[:, None], (*k.shape[:3], k_shared.shape[-1]))
    return np.concatenate([k, rotary], axis=-1)


def operands(batch: int, length: int, heads: int, own: int, shared: int, value: int, segments: int) -> tuple:
    """Returns q, k, v, k_shared and segment ids on the host; the logits of some queries are large."""
    q = normal(batch, length, heads, own + shared, dtype="float32").copy()
    q[:, ::7] *= 8
    ids = None
    if segments:
        ids = np.sort(np.random.default_rng(5).integers(0, segments, (batch, length)), axis=1).astype("i4")
    return (
        q.astype(jnp.bfloat16),
        normal(batch, length, heads, own, seed=1),
        normal(batch, length, heads, value, seed=2),
        normal(batch, length, shared, seed=3) if shared else None,
        ids,
    )


def attention(q, k, v, k_shared, ids, scale: float, causal: bool):
    """Returns the attended values [B, H, T, v], logarithms of sums and weights in float64."""
    q, k, v = (np.asarray(x, "f8").transpose(0, 2, 1, 3) for x in (q, k, v))
    if k_shared is not None:
        k = with_shared(k, k_shared)
    logits = q @ k.swapaxes(2, 3) * scale
    length = q.shape[2]
    seen = np.tril(np.ones((length, length), bool)) if causal else np.ones((length, length), bool)
    seen = np.broadcast_to(seen, logits.shape)
    if ids is not None:
        seen = seen & (ids[:, None, :, None] == ids[:, None, None, :])
    largest = np.where(seen, logits, -np.inf).max(-1, keepdims=True)
    weights = np.where(seen, np.exp(np.where(seen, logits, -np.inf) - largest), 0)
    total = weights.sum(-1, keepdims=True)
    weights /= total
    return weights @ v, (largest + np.log(total))[..., 0], weights
