"""Checks auxiliary-loss-free balancing: its update rule by exact arithmetic, and the metrics of balance."""

from __future__ import annotations

from fractions import Fraction

import jax.numpy as jnp
import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dsv3_jax.modules.balance import dead_experts, max_violation, update_biases

LOADS = st.lists(st.integers(0, 1000), min_size=2, max_size=12)


@settings(max_examples=60, deadline=None)
@given(LOADS, st.sampled_from([0.0, 0.001, 0.003]))
def test_update_is_the_sign_of_the_exact_load_error(load: list[int], speed: float):
    before = np.linspace(-0.3, 0.4, len(load), dtype=np.float32)
    after = update_biases(jnp.asarray(before)[None], jnp.asarray([load], jnp.int32), speed)[0]
    mean = Fraction(sum(load), len(load))
    signs = np.array([(mean > c) - (mean < c) for c in load], np.float32)
    np.testing.assert_array_equal(after, before + np.float32(speed) * signs)


def test_a_load_just_below_the_mean_moves_up():
    """Loads of 3 are below their mean of 10/3, which is not a whole number."""
    after = update_biases(jnp.zeros((1, 3)), jnp.asarray([[3, 3, 4]]), 1.0)
    np.testing.assert_array_equal(after, [[1, 1, -1]])


def test_equal_loads_move_nothing():
    biases = jnp.asarray([[0.25, -1.0, 0.5]])
    np.testing.assert_array_equal(update_biases(biases, jnp.asarray([[7, 7, 7]]), 0.001), biases)


def test_layers_are_balanced_independently():
    load = jnp.asarray([[4, 0], [1, 3], [2, 2]])
    np.testing.assert_array_equal(jnp.sign(update_biases(jnp.zeros((3, 2)), load, 0.1)), [[-1, 1], [1, -1], [0, 0]])


def test_the_sign_of_the_sum_is_not_the_sum_of_signs():
    """Where two micro-batches disagree, only the whole batch's load decides."""
    parts = jnp.asarray([[[9, 0, 0]], [[0, 5, 5]]])
    whole = update_biases(jnp.zeros((1, 3)), parts.sum(0), 1.0)
    apart = sum(update_biases(jnp.zeros((1, 3)), part, 1.0) for part in parts)
    np.testing.assert_array_equal(whole, [[-1, 1, 1]])
    assert not np.array_equal(np.sign(np.asarray(apart)), np.asarray(whole))


@settings(max_examples=30, deadline=None)
@example([0, 1, 2])
@given(LOADS.filter(any))
def test_max_violation_and_dead_experts(load: list[int]):
    array = jnp.asarray([load], jnp.int32)
    expected = max(load) / (sum(load) / len(load)) - 1
    np.testing.assert_allclose(max_violation(array)[0], expected, rtol=1e-5, atol=1e-6)
    assert int(dead_experts(array)[0]) == load.count(0)


def test_the_reports_batch_does_not_overflow():
    """With 62.9M tokens x 8 of 256 experts, one of which got six times the mean, E c_i exceeds int32."""
    load = jnp.full((1, 256), 1_960_000, jnp.int32).at[0, 3].set(12_000_000)
    signs = np.sign(np.asarray(update_biases(jnp.zeros((1, 256)), load, 0.001)))[0]
    assert signs[3] == -1
    assert np.all(np.delete(signs, 3) == 1)
