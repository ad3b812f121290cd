"""Checks the whole training step, compiled once, against AdamW in float64, and what it must never do."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import small_model
from small_runs import SETTINGS, assert_trees_equal, random_batch, small_run, small_start

from dsv3_jax.training import step as step_module
from dsv3_jax.training.losses import BatchTargets, LossWeights, objective
from dsv3_jax.training.optimizer import decay_mask
from dsv3_jax.training.state import TrainState, new_state
from dsv3_jax.training.step import StepMetrics, make_train_step

MOVABLE = ("params", "optimizer", "average", "router_biases", "key")


@functools.cache
def two_steps() -> tuple[list[TrainState], list[StepMetrics]]:
    """Returns the states after 0, 1 and 2 steps of two passes, and the steps' metrics."""
    start = small_start()
    states, metrics = [start.state], []
    for seed in (0, 1):
        state, reported = start.step(jax.tree.map(jnp.copy, states[-1]), *random_batch(seed, 2, 2), SETTINGS)
        states.append(state)
        metrics.append(jax.device_get(reported))
    return states, metrics


@functools.cache
def gradient_of():
    """Returns a function (params, biases, tokens, segments) -> gradients of the whole batch, without the step."""
    start = small_start()

    @functools.partial(jax.jit, static_argnames="argument")
    def gradient(params, biases, tokens, segments, argument=0):
        def loss(params, biases):
            terms = objective(
                start.skeleton.model(params, biases),
                tokens,
                segments,
                weights=LossWeights(balance=SETTINGS.balance_weight, mtp=SETTINGS.mtp_weight),
                targets=BatchTargets.count(segments, 1, isolate_segments=False),
                balance="sequence",
                isolate_segments=False,
                chunk=4096,
            )
            return terms.total, terms.load

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, biases)

    return gradient


def whole_batch(seed: int) -> tuple[jax.Array, jax.Array]:
    tokens, segments = random_batch(seed, 2, 2)
    return tokens.reshape(4, -1), segments.reshape(4, -1)


def leaves(tree) -> list[np.ndarray]:
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]


@pytest.mark.slow
def test_moments_of_two_steps_are_those_of_the_whole_batchs_gradient():
    """The gradient is computed again without passes; each leaf agrees up to the order of float32 sums."""
    states, metrics = two_steps()
    clip = small_start().config.training.gradient_clip
    for seed, (before, after, reported) in enumerate(zip(states[:2], states[1:], metrics, strict=True)):
        (gradients, _), _ = gradient_of()(before.params, before.router_biases, *whole_batch(seed))
        gradients = leaves(gradients)
        norm = np.sqrt(sum(np.sum(g**2) for g in gradients))
        np.testing.assert_allclose(reported.gradient_norm, norm, rtol=1e-5)
        old, new = (state.optimizer[1] for state in (before, after))
        for g, m, v, new_m, new_v in zip(
            gradients, leaves(old.mu), leaves(old.nu), leaves(new.mu), leaves(new.nu), strict=True
        ):
            g = g * min(1.0, clip / norm)
            for found, wanted in ((new_m, 0.9 * m + 0.1 * g), (new_v, 0.95 * v + 0.05 * g**2)):
                assert np.linalg.norm(found - wanted) <= 2e-4 * np.linalg.norm(wanted)


def test_two_steps_equal_adamw_in_float64():
    """Every parameter moves as AdamW says in float64 from the step's own moments, up to a few float32 roundings."""
    states, _ = two_steps()
    config, rate = small_start().config.training, float(SETTINGS.learning_rate)
    for count, (before, after) in enumerate(itertools.pairwise(states), start=1):
        moments, decayed = after.optimizer[1], jax.tree.leaves(decay_mask(before.params))
        for old, new, m, v, is_decayed in zip(
            leaves(before.params), leaves(after.params), leaves(moments.mu), leaves(moments.nu), decayed, strict=True
        ):
            adam = m / (1 - 0.9**count) / (np.sqrt(v / (1 - 0.95**count)) + config.epsilon)
            wanted = old - rate * (adam + 0.1 * old * is_decayed)
            assert np.all(np.abs(new - wanted) <= 4e-6 * rate * np.abs(adam) + 2.0**-22 * np.abs(old))


def test_only_norm_gains_escape_weight_decay():
    mask = jax.tree_util.tree_leaves_with_path(decay_mask(small_start().state.params))
    kept = {jax.tree_util.keystr(path) for path, decayed in mask if not decayed}
    assert kept
    assert all("norm" in path for path in kept)
    assert all("norm" not in jax.tree_util.keystr(path) for path, decayed in mask if decayed)


def test_every_parameter_receives_a_gradient():
    """Each leaf, stacked layer and chosen expert has a gradient; of the embedding, the rows of tokens in the batch."""
    start = small_start()
    (gradients, _), load = gradient_of()(start.state.params, start.state.router_biases, *whole_batch(0))
    assert np.all(np.asarray(load) > 0), "the batch must reach every expert"
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        name = jax.tree_util.keystr(path)
        stacked = "blocks" in name
        experts = "experts" in name
        parts = np.asarray(leaf).reshape(*leaf.shape[: stacked + experts], -1)
        assert np.all(np.abs(parts).max(axis=-1) > 0), name


def test_router_biases_have_neither_gradient_nor_optimizer_state():
    start = small_start()
    (_, of_biases), _ = gradient_of()(start.state.params, start.state.router_biases, *whole_batch(0))
    np.testing.assert_array_equal(of_biases, 0.0)
    for tree in (start.state.params, start.state.optimizer):
        assert not [p for p, _ in jax.tree_util.tree_leaves_with_path(tree) if "bias" in jax.tree_util.keystr(p)]


def test_a_model_without_experts_has_no_router_biases():
    config = small_run()
    model = config.model.replace(num_hidden_layers=1, first_k_dense_replace=1, num_nextn_predict_layers=0)
    _, state = new_state(small_model(model, 0), dataclasses.replace(config, model=model))
    assert state.router_biases.shape == (0, model.n_routed_experts)


def test_router_biases_move_by_the_sign_of_the_whole_batchs_load():
    states, metrics = two_steps()
    for before, after, reported in zip(states[:2], states[1:], metrics, strict=True):
        load = np.asarray(reported.load, np.int64)
        # Each token has K experts; MTP has one position less per row.
        assert load.sum(axis=1).tolist() == [4 * 32 * 2, 4 * 31 * 2]
        sign = np.sign(load.sum(axis=1, keepdims=True) - load.shape[1] * load)
        np.testing.assert_array_equal(
            after.router_biases, before.router_biases + np.float32(1e-3) * sign.astype(np.float32)
        )


def test_how_a_batch_is_cut_changes_nothing_but_rounding():
    """For the same four rows, some padded, loads and biases are equal, and sums agree up to their order."""
    start = small_start()
    rows = [array.reshape(4, -1) for array in random_batch(7, 2, 2, padded=True)]
    results = []
    for order in ([0, 1, 2, 3], [2, 0, 1, 3]):
        cut = [array[jnp.asarray(order)].reshape(2, 2, -1) for array in rows]
        results.append(start.step(start.fresh(), *cut, SETTINGS))
    (state_a, a), (state_b, b) = results
    np.testing.assert_array_equal(a.load, b.load)
    np.testing.assert_array_equal(state_a.router_biases, state_b.router_biases)
    for name in ("loss", "main_loss", "mtp_loss", "gradient_norm"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=2e-5, err_msg=name)
    # Passes are weighted by their targets, sequences within a pass by their inputs; for padded rows they differ by one.
    np.testing.assert_allclose(a.balance_loss, b.balance_loss, rtol=1e-3)
    real_inputs = int(np.sum(np.asarray(rows[1])[:, :-1] != 0))
    assert int(a.load[0].sum()) == 2 * real_inputs, "padding is not counted"


def test_the_average_of_the_weights_follows_them():
    """The decay is (1 + step) / (10 + step): 1/10, then 2/11."""
    states, _ = two_steps()
    for decay, before, after in zip((1 / 10, 2 / 11), states[:2], states[1:], strict=True):
        for old, new, average in zip(leaves(before.average), leaves(after.params), leaves(after.average), strict=True):
            np.testing.assert_allclose(average, decay * old + (1 - decay) * new, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bad", ["nan in a parameter", "inf in a parameter", "infinite weight", "nan weight"])
def test_a_step_that_is_not_finite_changes_nothing(bad: str):
    start = small_start()
    state, settings = start.fresh(), SETTINGS
    if "parameter" in bad:
        value = jnp.nan if "nan" in bad else jnp.inf
        params = jax.tree.map(lambda leaf: leaf, state.params)
        params["final_norm"]["weight"][...] = params["final_norm"]["weight"][...].at[3].set(value)
        state = dataclasses.replace(state, params=params)
    else:
        settings = dataclasses.replace(SETTINGS, mtp_weight=jnp.float32(jnp.inf if "inf" in bad else jnp.nan))
    before = jax.tree.map(jnp.copy, state)
    after, metrics = start.step(state, *random_batch(0, 2, 2), settings)
    assert not bool(metrics.applied)
    for name in MOVABLE:
        assert_trees_equal(getattr(after, name), getattr(before, name))
    assert int(after.step) == 1
    assert int(after.nonfinite_steps) == int(metrics.nonfinite_steps) == 1
    again, metrics = start.step(after, *random_batch(1, 2, 2), settings)
    assert int(metrics.nonfinite_steps) == 2
    if "weight" in bad:
        good, metrics = start.step(again, *random_batch(2, 2, 2), SETTINGS)
        assert bool(metrics.applied)
        assert int(good.nonfinite_steps) == 0


def test_a_gradient_that_is_not_finite_under_a_finite_loss_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    start = small_start()

    def poisoned(model, *args, **kwargs):
        terms = objective(model, *args, **kwargs)
        zero = jnp.sum(model.final_norm.weight[...]) * 0.0
        return dataclasses.replace(terms, total=terms.total + jnp.sqrt(zero))  # value 0, derivative infinite

    monkeypatch.setattr(step_module, "objective", poisoned)
    step = make_train_step(start.skeleton, start.config)
    state = start.fresh()
    before = jax.tree.map(jnp.copy, state)
    after, metrics = step(state, *random_batch(0, 1, 2), SETTINGS)
    assert np.isfinite(metrics.loss)
    assert not bool(metrics.applied)
    for name in MOVABLE:
        assert_trees_equal(getattr(after, name), getattr(before, name))
