"""Checks rotary frequencies and YaRN against published values, complex arithmetic and the definition."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.config import ModelConfig, RopeScaling
from dsv3_jax.modules.rope import make_rotation, rotary_frequencies, rotate, softmax_scale

V3 = ModelConfig.preset("v3-671b")


def test_v3_yarn_frequencies():
    frequencies = rotary_frequencies(64, 10000.0, V3.rope_scaling)
    expected = {
        9: 0.0749894,
        10: 0.0562341,
        11: 0.0390069,
        16: 0.0055,
        22: 1.778279e-4,
        23: 3.333804e-5,
        31: 3.333804e-6,
    }
    for index, value in expected.items():
        assert frequencies[index] == pytest.approx(value, rel=1e-5), index


def test_kimi_yarn_has_a_step_for_a_ramp():
    scaling = ModelConfig.preset("kimi-k2-1t").rope_scaling
    ratio = rotary_frequencies(64, 50000.0, scaling) / rotary_frequencies(64, 50000.0, None)
    np.testing.assert_allclose(ratio[:20], 1.0)
    np.testing.assert_allclose(ratio[20:], 1 / 32)


def test_softmax_scale():
    assert softmax_scale(V3) == pytest.approx(0.1352338, rel=1e-6)
    lite = V3.replace(
        rope_scaling=RopeScaling(factor=40.0, original_max_position_embeddings=4096, mscale=0.707, mscale_all_dim=0.707)
    )
    assert softmax_scale(lite) == pytest.approx(0.1147214, rel=1e-6)
    assert softmax_scale(V3.replace(rope_scaling=None)) == pytest.approx(192**-0.5)


def test_cosines_are_scaled_only_when_the_two_mscales_differ():
    positions = jnp.zeros((1, 1), jnp.int32)
    assert float(make_rotation(V3, positions).cos[0, 0, 0]) == 1.0
    scaling = RopeScaling(factor=40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=0.5)
    expected = (0.1 * np.log(40) + 1) / (0.05 * np.log(40) + 1)
    assert float(make_rotation(V3.replace(rope_scaling=scaling), positions).cos[0, 0, 0]) == pytest.approx(expected)


@settings(max_examples=20, deadline=None)
@given(position=st.integers(0, 4096), seed=st.integers(0, 100))
def test_rotation_is_complex_multiplication_of_interleaved_pairs(position, seed):
    config = ModelConfig.preset("tiny", qk_rope_head_dim=8)
    x = np.random.default_rng(seed).normal(size=(1, 1, 2, 8)).astype(np.float32)
    turned = np.asarray(rotate(jnp.asarray(x), make_rotation(config, jnp.full((1, 1), position))))
    angles = position * rotary_frequencies(8, config.rope_theta, None)
    expected = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)
    np.testing.assert_allclose(turned[..., 0::2], expected.real, atol=2e-3)
    np.testing.assert_allclose(turned[..., 1::2], expected.imag, atol=2e-3)


def test_scores_depend_on_distance_only():
    config = ModelConfig.preset("tiny", qk_rope_head_dim=8)
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 8)).astype(np.float32)) for _ in range(2))

    def score(at_q, at_k):
        turn = [rotate(x, make_rotation(config, jnp.full((1, 1), p))) for x, p in ((q, at_q), (k, at_k))]
        return float(jnp.sum(turn[0] * turn[1]))

    assert score(7, 3) == pytest.approx(score(107, 103), abs=1e-4)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3
