"""Checks the optimizer against AdamW in float64, and the running average of the weights against its definition."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import ModelConfig
from dsv3_jax.training.config import TrainingConfig
from dsv3_jax.training.optimizer import make_optimizer, update_average

CONFIG = TrainingConfig(beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.1, gradient_clip=0.7)


def random_tree(seed: int) -> dict[str, Any]:
    """Returns a matrix whose numbers differ in size by twelve orders of magnitude, and the gains of a norm."""
    random = np.random.default_rng(seed)
    sizes = 10.0 ** random.uniform(-12, 0, (20, 30))
    tree = {"head": {"weight": random.normal(size=(20, 30)) * sizes}, "final_norm": {"weight": random.normal(size=30)}}
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


@pytest.mark.parametrize("moment_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [1e-3, 10.0], ids=["not clipped", "clipped"])
def test_updates_are_adamws(moment_dtype: str, size: float) -> None:
    """Compares every step with float64 arithmetic on the stored moments of the step before.

    Rounding to bfloat16 happens between steps only: within a step the error is that of a few float32 operations.
    """
    optimizer = make_optimizer(CONFIG, moment_dtype, ModelConfig.preset("tiny"))
    params = random_tree(0)
    state = optimizer.init(params)
    # 1 - 0.9^count and 1 - 0.95^count lose up to 20 times float32's relative error.
    eps32, stored_eps = 2.0**-19, float(jnp.finfo(moment_dtype).eps)
    for count in range(1, 6):
        gradients = jax.tree.map(lambda leaf: leaf * size, random_tree(count))
        norm = np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(gradients)))
        assert (norm > CONFIG.gradient_clip) == (size > 1)
        before = state[1]
        updates, state = optimizer.update(gradients, state, params)
        for name, decay in (("head", 0.1), ("final_norm", 0.0)):
            g, m, v, w, got, new_m, new_v = (
                np.asarray(tree[name]["weight"], np.float64)
                for tree in (gradients, before.mu, before.nu, params, updates, state[1].mu, state[1].nu)
            )
            g = g * min(1.0, CONFIG.gradient_clip / norm)
            sizes = 0.9 * np.abs(m) + 0.1 * np.abs(g)  # the terms of m, which may cancel
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
            denominator = np.sqrt(v / (1 - 0.95**count)) + 1e-8
            wanted = m / (1 - 0.9**count) / denominator + decay * w
            error = eps32 * (sizes / (1 - 0.9**count) / denominator + decay * np.abs(w))
            assert np.all(np.abs(got - wanted) <= error)
            assert np.all(np.abs(new_m - m) <= stored_eps * np.abs(m) / 2 + eps32 * sizes)
            assert np.all(np.abs(new_v - v) <= (stored_eps / 2 + eps32) * v)
            for moment in (state[1].mu, state[1].nu):
                assert moment[name]["weight"].dtype == moment_dtype


@pytest.mark.parametrize("step", [0, 1, 7, 80, 889, 890, 100_000])
def test_the_decay_of_the_average_rises_to_its_value(step: int) -> None:
    """The decay is (1 + step) / (10 + step), but at most 0.99, which it reaches at step 890."""
    average, params = random_tree(0), random_tree(1)
    decay = min(0.99, (1 + step) / (10 + step))
    assert (decay == 0.99) == (step >= 890)
    found = update_average(average, params, 0.99, jnp.int32(step))
    for got, old, new in zip(*(jax.tree.leaves(tree) for tree in (found, average, params)), strict=True):
        old, new = np.asarray(old, np.float64), np.asarray(new, np.float64)
        # 1 - decay has float32's absolute error: a few times 6e-8.
        np.testing.assert_allclose(got, decay * old + (1 - decay) * new, rtol=1e-6, atol=3e-7 * np.abs(new).max())
