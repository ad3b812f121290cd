"""Checks numerics of the model's parts in bfloat16 and at their edges, against float64: sums, logits, masks, bounds."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import pallas_kernels as pk
from dsv3_jax.config import ModelConfig, RopeScaling
from dsv3_jax.counts import count_flops
from dsv3_jax.modules import moe
from dsv3_jax.modules.attention_core import causal_attention
from dsv3_jax.modules.balance import balance_terms
from dsv3_jax.modules.latent_cache import DenseCache
from dsv3_jax.modules.moe import MixtureOfExperts
from dsv3_jax.modules.norm import RMSNorm
from dsv3_jax.modules.rope import rotary_frequencies
from dsv3_jax.modules.tiled_attention import tiled_attention
from dsv3_jax.precision import Precision

ULP = 2.0**-8  # half a step of bfloat16, relative


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def test_norms_are_computed_in_float32() -> None:
    """The result is rounded once: the mean of squares in bfloat16 would be off by more."""
    norm = RMSNorm(512, 1e-6, dtype=jnp.dtype(jnp.float32))
    norm.weight[...] = jnp.asarray(1 + normal(0, 512), jnp.float32)
    x = jnp.asarray(normal(1, 64, 512) + 3, jnp.bfloat16)
    wide, gain = np.asarray(x, np.float64), np.asarray(norm.weight[...], np.float64)
    exact = wide / np.sqrt(np.mean(wide**2, axis=-1, keepdims=True) + 1e-6) * gain
    assert np.all(np.abs(np.asarray(norm(x), np.float64) - exact) <= np.abs(exact) * ULP * 1.001)


def exact_attention(q: Any, k: Any, v: Any, scale: float) -> np.ndarray:
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    logits = scale * np.einsum("bqhc,bshc->bhqs", q, k)
    logits = np.where(np.tril(np.ones(logits.shape[-2:], bool)), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bhqs,bshv->bqhv", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("tiled", [False, True])
def test_logits_of_attention_are_not_rounded(tiled: bool) -> None:
    """Logits near 100 that differ by about 1: bfloat16 errs by up to 1/4 there, and weights with it by a quarter."""
    q = jnp.asarray(normal(0, 1, 40, 2, 16) + 5, jnp.bfloat16)
    k = jnp.asarray(normal(1, 1, 40, 2, 16) * 0.1 + 5, jnp.bfloat16)
    v = jnp.asarray(np.abs(normal(2, 1, 40, 2, 8)) + 1, jnp.bfloat16)
    got = tiled_attention(q, k, v, None, 0.25, 16) if tiled else causal_attention(q, k, v, scale=0.25)
    np.testing.assert_allclose(np.asarray(got, np.float64), exact_attention(q, k, v, 0.25), rtol=4 * ULP)


@pytest.mark.parametrize("offset", [-40.0, 40.0])
def test_attention_with_logits_far_from_zero(offset: float) -> None:
    """Logits around -400 and 400, whose exponentials leave float32."""
    q, k = jnp.asarray(normal(0, 1, 40, 1, 4) * 0.1 + 1, jnp.float32), jnp.asarray(normal(1, 1, 40, 1, 4), jnp.float32)
    v = jnp.asarray(normal(2, 1, 40, 1, 3), jnp.float32)
    k = k + offset * 2.5
    for got in (tiled_attention(q, k, v, None, 1.0, 16), causal_attention(q, k, v, scale=1.0)):
        np.testing.assert_allclose(got, exact_attention(q, k, v, 1.0), rtol=1e-3, atol=1e-3)


def test_balance_of_sequences_of_different_lengths() -> None:
    """The batch's f and P are over all of its tokens: a long sequence counts for more than a short one."""
    rng = np.random.default_rng(0)
    shares, hits = rng.random((3, 8, 4)), rng.integers(0, 2, (3, 8, 4))
    shares /= shares.sum(-1, keepdims=True)
    mask = np.arange(8) < np.array([[8], [2], [5]])
    lengths = mask.sum(1)
    f = np.stack([2.0 * hits[s, : lengths[s]].mean(0) for s in range(3)])
    P = np.stack([shares[s, : lengths[s]].mean(0) for s in range(3)])
    sequence, batch = balance_terms(
        jnp.asarray(f, jnp.float32),
        jnp.asarray(P, jnp.float32),
        jnp.asarray(mask, jnp.float32),
        sum_over_batch=lambda x: x,
    )
    whole = (2.0 * hits[mask].mean(0) * shares[mask].mean(0)).sum()
    assert float(batch) == pytest.approx(whole, rel=1e-5)
    assert float(sequence) == pytest.approx(((f * P).sum(1) * lengths).sum() / 15, rel=1e-5)


def test_balance_of_padding_alone_is_zero() -> None:
    zeros = jnp.zeros((2, 4))
    terms = balance_terms(zeros, zeros, jnp.zeros((2, 8)), sum_over_batch=lambda x: x)
    assert [float(term) for term in terms] == [0.0, 0.0]


def test_entries_past_the_end_of_a_cache_are_dropped() -> None:
    cache = DenseCache.empty(2, 2, 4, 3, 2, jnp.dtype(jnp.float32))
    entry, key = jnp.ones((2, 2, 3)), jnp.ones((2, 2, 2))
    written = cache.write(1, jnp.asarray([[3, 4], [1, 9]]), entry, key)
    for array in (written.latent, written.rope_key):
        assert np.asarray(array[1, :, :, 0]).tolist() == [[0, 0, 0, 1], [0, 1, 0, 0]]
        assert not np.asarray(array[0]).any()


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_few_tokens_are_decoded_with_gates_in_float32(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token with four experts: their outputs in bfloat16 are weighted and added without further rounding.

    A CPU computes experts in blocks of rows, other devices row by row.
    """
    monkeypatch.setattr(moe, "target_platform", lambda: platform)
    config = ModelConfig.preset("tiny", n_routed_experts=8, num_experts_per_tok=4, n_group=1, topk_group=1)
    precision = Precision.preset("bfloat16")
    layer = MixtureOfExperts(config, dtype=jnp.dtype("float32"), precision=precision, rngs=nnx.Rngs(0))
    experts: Any = layer.experts
    experts.gate_up[...] *= 100
    experts.down[...] *= 100
    u = jnp.asarray(normal(0, 1, config.hidden_size), jnp.bfloat16)
    index = jnp.asarray([[[5, 0, 3, 6]]], jnp.int32)

    def decoded(gate: np.ndarray) -> np.ndarray:
        zeros = jnp.zeros((1, 8))
        gates = pk.Gates(index, jnp.asarray(gate, jnp.float32)[None, None], jnp.zeros(8, jnp.int32), zeros, zeros)
        return np.asarray(experts.of_few(u, gates, jnp.ones(1, bool), None), np.float64)[0]

    each = np.stack([decoded(row) for row in np.eye(4)])
    gate = np.array([0.337, 0.291, 0.203, 0.169])
    assert np.all(np.abs(decoded(gate) - gate @ each) <= np.abs(gate @ each) * ULP * 1.001 + 1e-7)


@pytest.mark.parametrize(
    ("context", "theta", "width", "fast"),
    [(65536, 100.0, 8, 1000.0), (65536, 100.0, 8, 32.0), (4096, 10000.0, 64, 32.0), (16, 10000.0, 64, 32.0)],
)
def test_yarn_by_its_published_code(context: int, theta: float, width: int, fast: float) -> None:
    """Bounds of the ramp are clamped to pairs 0 and width - 1; every pair by the published formula, in plain Python."""
    scaling = RopeScaling(factor=40.0, original_max_position_embeddings=context, beta_fast=fast)

    def correction(rotations: float) -> float:
        return (width * math.log(context / (rotations * 2 * math.pi))) / (2 * math.log(theta))

    low, high = max(math.floor(correction(fast)), 0), min(math.ceil(correction(1.0)), width - 1)
    wanted = []
    for pair in range(width // 2):
        plain = theta ** (-2 * pair / width)
        ramp = min(max((pair - low) / max(high - low, 0.001), 0.0), 1.0)
        wanted.append(plain / 40.0 * ramp + plain * (1 - ramp))
    np.testing.assert_allclose(rotary_frequencies(width, theta, scaling), wanted, rtol=1e-12)


def test_operations_of_the_attention_core() -> None:
    """A token attends to half of a sequence on average, by the convention of MFU: 2,048 keys of 4,096."""
    terms = count_flops(ModelConfig.preset("v3-671b"), 4096).terms
    assert terms["attention_core"] == 61 * 128 * 2 * (192 + 128) * 2048
