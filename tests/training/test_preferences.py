"""Checks the loss of a reward model against a loop in float64, with its gradient, and the step that takes it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import small_model
from small_runs import SETTINGS, batch_of_pairs, small_run

from dsv3_jax.training.evaluation_step import make_evaluation_step
from dsv3_jax.training.preferences import differences, pair_losses
from dsv3_jax.training.state import new_state
from dsv3_jax.training.step import make_train_step

RUN = small_run(ema_decay=0.0, gradient_clip=1e30)
RUN = dataclasses.replace(
    RUN,
    data=dataclasses.replace(RUN.data, form="preferences", isolate_documents=True),
    model=RUN.model.replace(
        num_hidden_layers=1, first_k_dense_replace=1, num_nextn_predict_layers=0, initializer_range=0.3
    ),
)


def brute_force(hidden: np.ndarray, row: np.ndarray, segments: np.ndarray) -> tuple[list[float], np.ndarray]:
    """Returns the margins, and the gradient of the sum of their losses with respect to the hidden states."""
    margins, gradient = [], np.zeros_like(hidden)
    for b, ids in enumerate(np.abs(segments)):
        ends = {number: np.flatnonzero(ids == number)[-1] for number in range(1, ids.max() + 1)}
        for chosen in range(1, ids.max() + 1, 2):
            better, worse = ends[chosen], ends[chosen + 1]
            margin = row @ hidden[b, better] - row @ hidden[b, worse]
            margins.append(margin)
            gradient[b, better] -= row / (1 + np.exp(margin))
            gradient[b, worse] += row / (1 + np.exp(margin))
    return margins, gradient


def test_loss_and_gradient_equal_loops() -> None:
    tokens, segments = batch_of_pairs(0, 3)
    model = small_model(RUN.model, 0)
    hidden = np.random.default_rng(1).normal(size=(*tokens[:, :-1].shape, RUN.model.hidden_size)).astype(np.float32)

    def loss(hidden: Any) -> jax.Array:
        margins, counted = differences(model, hidden, jnp.asarray(segments))
        return jnp.sum(pair_losses(margins) * counted)

    row = np.asarray(model.head.weight[0], np.float64)
    margins, gradient = brute_force(hidden.astype(np.float64), row, segments)
    assert len(margins) == 5
    value, found = jax.value_and_grad(loss)(hidden)
    np.testing.assert_allclose(value, np.sum(np.log1p(np.exp(-np.array(margins)))), rtol=1e-5)
    np.testing.assert_allclose(found, gradient, atol=1e-5)
    got, counted = differences(model, jnp.asarray(hidden), jnp.asarray(segments))
    np.testing.assert_allclose(np.asarray(got)[np.asarray(counted)], margins, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_step_and_an_evaluation() -> None:
    """The loss is the mean over the pairs of all passes; each text is read alone, as if it had its own row."""
    tokens, segments = batch_of_pairs(2, 4)
    skeleton, state = new_state(small_model(RUN.model, 0), RUN)
    model = skeleton.model(state.params, state.router_biases)
    row = np.asarray(model.head.weight[0], np.float64)
    margins = []
    for text, ids in zip(tokens, np.abs(segments), strict=True):
        ends = [
            np.asarray(model.features(jnp.asarray(text[ids == number])[None]).hidden[0, -1], np.float64) @ row
            for number in range(1, ids.max() + 1)
        ]
        margins += [better - worse for better, worse in zip(ends[::2], ends[1::2], strict=True)]
    wanted = np.mean(np.log1p(np.exp(-np.array(margins))))

    sums = make_evaluation_step(skeleton, RUN)(state.params, state.router_biases, tokens, segments, np.zeros(1))
    assert sums.targets[0] == len(margins) == 7
    np.testing.assert_allclose(sums.nats[0] / 7, wanted, rtol=1e-4)
    assert sums.accepted[0] == sum(margin > 0 for margin in margins)

    passes = [jnp.asarray(array).reshape(2, 2, -1) for array in (tokens, segments)]
    new, metrics = make_train_step(skeleton, RUN)(jax.tree.map(jnp.copy, state), *passes, SETTINGS)
    np.testing.assert_allclose(metrics.main_loss, wanted, rtol=1e-4)
    assert len(metrics.mtp_loss) == 0
    for before, after in zip(jax.tree.leaves(state.params), jax.tree.leaves(new.params), strict=True):
        assert np.any(np.asarray(before) != np.asarray(after))
