"""Checks distillation on logits against loops in float64, with the gradient, and the loss that a step takes."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import small_model
from small_runs import SETTINGS, packed_batch, small_run

from dsv3_jax.training.config import TeacherConfig
from dsv3_jax.training.distillation import Teacher, divergence
from dsv3_jax.training.losses import is_target
from dsv3_jax.training.state import new_state, split_model
from dsv3_jax.training.step import make_train_step


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


def brute_force(student: np.ndarray, teacher: np.ndarray, top_k: int) -> tuple[float, np.ndarray]:
    """Returns D of one position and its gradient with respect to the student's logits, in float64."""
    p, q = softmax(teacher.astype(np.float64)), softmax(student.astype(np.float64))
    kept = sorted(range(len(p)), key=lambda v: -p[v])[: top_k or len(p)]
    rest = [v for v in range(len(p)) if v not in kept]
    found, gradient = 0.0, q.copy()
    for v in kept:
        found += p[v] * np.log(p[v] / q[v])
        gradient[v] -= p[v]
    if rest:
        outside, theirs = q[rest].sum(), p[rest].sum()
        found += theirs * np.log(theirs / outside)
        gradient[rest] -= theirs * q[rest] / outside
    return found, gradient


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 12), st.integers(0, 14), st.integers(0, 1000), st.sampled_from([0.1, 3.0, 20.0]))
def test_divergence_and_gradient_equal_loops(vocabulary: int, top_k: int, seed: int, size: float) -> None:
    random = np.random.default_rng(seed)
    student, teacher = (size * random.normal(size=(2, 3, vocabulary))).astype(np.float32)
    found, gradient = jax.value_and_grad(lambda s: jnp.sum(divergence(s, jnp.asarray(teacher), top_k)))(student)
    each = [brute_force(s, t, top_k) for s, t in zip(student, teacher, strict=True)]
    np.testing.assert_allclose(found, sum(value for value, _ in each), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradient, np.stack([row for _, row in each]), atol=3e-6 * max(size, 1))


def test_more_tokens_tell_more_and_a_perfect_student_has_nothing_to_learn() -> None:
    student, teacher = np.random.default_rng(0).normal(size=(2, 5, 20)).astype(np.float32)
    values = [np.asarray(divergence(student, teacher, top_k)) for top_k in (1, 2, 5, 19, 0)]
    for fewer, more in itertools.pairwise(values):
        assert np.all(fewer <= more + 1e-6)
    assert np.all(values[0] > 0)
    np.testing.assert_allclose(divergence(teacher, teacher, 4), 0, atol=1e-6)
    even = jnp.zeros((1, 6))  # all as likely as the last of the first two: all are told apart
    np.testing.assert_allclose(divergence(even, even, 2), 0, atol=1e-6)
    assert np.all(np.isfinite(jax.grad(lambda s: divergence(s, even, 2)[0])(even)))


@pytest.mark.slow
@pytest.mark.parametrize("weight", [0.25, 1.0])
def test_a_step_learns_tokens_and_teacher(weight: float) -> None:
    """Only learned tokens count; the teacher is wider than the student, and both are computed in pieces."""
    run = small_run(ema_decay=0.0, loss_chunk=20, qk_clip=0.0)
    model = run.model.replace(num_hidden_layers=1, first_k_dense_replace=1, num_nextn_predict_layers=0)
    wide = model.replace(hidden_size=2 * model.hidden_size, initializer_range=0.3)
    config = dataclasses.replace(
        run,
        model=model,
        data=dataclasses.replace(run.data, isolate_documents=True),
        teacher=TeacherConfig(run="wide", top_k=5, weight=weight),
    )
    skeleton, state = new_state(small_model(model.replace(initializer_range=0.1), 0), config)
    teacher = small_model(wide, 1)
    tokens, segments = packed_batch(0, 2, 2)
    step = make_train_step(skeleton, config, None, Teacher(*split_model(teacher)))
    _, metrics = step(jax.tree.map(jnp.copy, state), tokens, segments, SETTINGS)

    student, losses, divergences = skeleton.model(state.params, state.router_biases), [], []
    for row, ids in zip(tokens.reshape(4, -1), segments.reshape(4, -1), strict=True):
        one, other = (
            np.asarray(m(row[None, :-1], segment_ids=ids[None, :-1]).logits[0], np.float64) for m in (student, teacher)
        )
        for i in np.flatnonzero(is_target(ids, 1, isolate_segments=True)):
            losses.append(-np.log(softmax(one[i])[row[i + 1]]))
            divergences.append(brute_force(one[i], other[i], 5)[0])
    np.testing.assert_allclose(metrics.main_loss, np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(metrics.distillation_loss, np.mean(divergences), rtol=1e-4)
    total = (1 - weight) * np.mean(losses) + weight * np.mean(divergences)
    np.testing.assert_allclose(metrics.loss, total, rtol=1e-4)
