"""Checks of a policy's update against plain formulas: log-probabilities, replayed experts, and the gradient."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from simulated import run_simulated
from small_models import small_model
from small_runs import VOCABULARY, small_run

from dsv3_jax.inference import Engine, EngineConfig
from dsv3_jax.model import DeepSeekV3
from dsv3_jax.post_training.grpo import Completions, GRPOConfig
from dsv3_jax.post_training.policy_step import Texts, log_probs_and_entropies, make_policy_step
from dsv3_jax.post_training.rejection import Completion
from dsv3_jax.post_training.rollouts import Rollout, RolloutConfig, draw_rollout
from dsv3_jax.post_training.tasks import Problem, TaskSize, generate_problems
from dsv3_jax.runs.reinforcement_start import policy_state
from dsv3_jax.training.state import new_state, split_trained

LENGTH = 13
CONFIG = small_run(micro_batch_size=0, ema_decay=0.0, weight_decay=0.0, gradient_clip=1e6, loss_chunk=16)
CONFIG = dataclasses.replace(
    CONFIG, model=CONFIG.model.replace(num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0)
)


def weights() -> DeepSeekV3:
    """Returns a model whose distributions are far from even."""
    return small_model(CONFIG.model.replace(initializer_range=0.3), 0)


def some_texts() -> Texts:
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, (3, LENGTH)).astype(np.int32)
    return Texts(jnp.asarray(tokens), jnp.asarray([LENGTH, 7, 10], jnp.int32), None)


def test_log_probs_and_entropies() -> None:
    model, texts = weights(), some_texts()
    logits = np.asarray(model(texts.tokens[:, :-1]).logits, np.float64)
    logs = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    wanted = np.take_along_axis(logs, np.asarray(texts.tokens)[:, 1:, None], axis=-1)[..., 0]
    found, entropies, _ = log_probs_and_entropies(model, texts, chunk=16)
    inside = np.arange(LENGTH - 1) < np.asarray(texts.lengths)[:, None] - 1
    np.testing.assert_allclose(np.asarray(found)[inside], wanted[inside], atol=2e-5)
    entropy = -np.sum(np.exp(logs) * logs, axis=-1)
    np.testing.assert_allclose(np.asarray(entropies)[inside], entropy[inside], atol=2e-5)
    # A prompt that is cut off has the same log-probabilities: padding changes nothing.
    short = Texts(texts.tokens[1:2, :8], texts.lengths[1:2], None)
    np.testing.assert_allclose(
        log_probs_and_entropies(model, short, chunk=16)[0][0, :6], np.asarray(found)[1, :6], atol=2e-5
    )


@pytest.mark.slow
def test_engine_and_trainer_agree_and_experts_are_replayed() -> None:
    """What the engine drew, the trainer gives the same probability; with other experts it does not."""

    class Letters:
        end_ids = (0,)

        def prompt_ids(self, text: str) -> list[int]:
            return [byte % VOCABULARY for byte in text.encode()]

        def decode(self, ids) -> str:
            return " ".join(map(str, ids))

    model = weights()
    engine = Engine(model, EngineConfig(max_sequences=4, drafts=0, top_logprobs=1, record_experts=True, context=48))
    problems = [next(generate_problems("arithmetic", "train", 0, TaskSize()))] * 2
    config = RolloutConfig(prompts=2, group=2, max_new_tokens=9)
    rollout = draw_rollout(engine, Letters(), problems, config, step=3)  # pyright: ignore[reportArgumentType]
    assert rollout is not None
    texts, completions = jax.tree.map(
        lambda leaf: jnp.asarray(leaf[0]), rollout.batch(divide_by_deviation=True, experts=True)
    )
    mask = np.asarray(completions.mask)
    assert mask.sum() == sum(len(row.ids) for row in rollout.completions)
    found = log_probs_and_entropies(model, texts, chunk=64)[0]
    np.testing.assert_allclose(np.asarray(found)[mask], np.asarray(completions.drawn)[mask], atol=2e-5)
    own = log_probs_and_entropies(model, dataclasses.replace(texts, experts=None), chunk=64)[0]
    np.testing.assert_array_equal(np.asarray(found)[mask], np.asarray(own)[mask])
    others = dataclasses.replace(texts, experts=(texts.experts + 1) % CONFIG.model.n_routed_experts)
    changed = log_probs_and_entropies(model, others, chunk=64)[0]
    assert np.max(np.abs(np.asarray(changed - found)[mask])) > 1e-3
    again = draw_rollout(engine, Letters(), problems, config, step=3)  # pyright: ignore[reportArgumentType]
    assert again is not None
    assert again.groups == rollout.groups


@pytest.mark.parametrize("micro", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_one_positive_member_without_kl_is_weighted_fine_tuning(micro: int) -> None:
    """The gradient is that of the member's mean cross-entropy, times its advantage, over the number of completions."""
    texts = jax.tree.map(lambda leaf: leaf.reshape(-1, micro or 3, *leaf.shape[1:]), some_texts())
    starts = np.asarray([5, 3, 4])
    positions = np.arange(LENGTH - 1)
    mask = (positions >= starts[:, None] - 1) & (positions < np.asarray(some_texts().lengths)[:, None] - 1)
    advantages = np.asarray([0.0, 1.5, 0.0], np.float32)
    completions = jax.tree.map(
        lambda leaf: jnp.asarray(leaf).reshape(-1, micro or 3, *leaf.shape[1:]),
        Completions(mask, advantages, None, np.zeros(mask.shape, np.float32), None, np.zeros(3, bool)),  # pyright: ignore
    )
    model = weights()
    skeleton, state = new_state(model, CONFIG)
    trained, kept = split_trained(state.params)
    assert not jax.tree.leaves(kept)

    def fine_tuning(trained):
        logits = skeleton.model(trained, state.router_biases)(some_texts().tokens[1:2, :-1]).logits[0]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, some_texts().tokens[1, 1:])
        return 1.5 / 3 * jnp.mean(losses[mask[1]])

    wanted = jax.grad(fine_tuning)(trained)
    step = make_policy_step(skeleton, CONFIG, GRPOConfig(kl_weight=0.0), longest=8, donate=False)
    after, metrics = step(policy_state(state, reference=False), texts, completions, jnp.float32(0.0))
    moments = optax.tree_utils.tree_get(after.optimizer, "mu")
    for (path, leaf), moment in zip(jax.tree_util.tree_leaves_with_path(wanted), jax.tree.leaves(moments), strict=True):
        scale = float(jnp.max(jnp.abs(leaf))) or 1.0
        np.testing.assert_allclose(
            np.asarray(moment) / (1 - CONFIG.training.beta1) / scale,
            np.asarray(leaf) / scale,
            atol=2e-4,
            err_msg=jax.tree_util.keystr(path),
        )
    assert float(metrics.terms.loss) == pytest.approx(-0.5, rel=1e-5)  # ratios are 1: J is the mean advantage
    assert bool(metrics.applied)


def test_an_update_that_is_not_finite_changes_nothing() -> None:
    skeleton, state = new_state(weights(), CONFIG)
    before = policy_state(state, reference=False)
    mask = np.ones((1, 3, LENGTH - 1), bool)
    completions = Completions(
        mask, np.full((1, 3), np.nan, np.float32), None, np.zeros(mask.shape, np.float32), None, np.zeros((1, 3), bool)
    )  # pyright: ignore
    texts = jax.tree.map(lambda leaf: leaf[None], some_texts())
    step = make_policy_step(skeleton, CONFIG, GRPOConfig(kl_weight=0.0), longest=8, donate=False)
    after, metrics = step(before, texts, completions, jnp.float32(1.0))
    assert not bool(metrics.applied)
    assert int(after.nonfinite_steps) == 1
    for old, new in zip(jax.tree.leaves(before.params), jax.tree.leaves(after.params), strict=True):
        np.testing.assert_array_equal(old, new)


def rollout_of(rewards: list[list[float]], cut: bool = False) -> Rollout:
    groups = tuple(
        tuple(Completion("", (1,) * (2 + at), (0.0,) * (2 + at), (), cut, {"reward": r}) for at, r in enumerate(group))
        for group in rewards
    )
    problems = tuple(Problem(str(number), "", "exact") for number in range(len(rewards)))
    return Rollout(problems, tuple((5,) * (number + 1) for number in range(len(rewards))), groups, 0.25, 0.0, 0.0)


def test_rows_of_a_rollout() -> None:
    rollout = rollout_of([[1.0, 0.0], [0.5, 0.5]], cut=True)
    np.testing.assert_allclose(rollout.rewards(), [[0.75, -0.25], [0.25, 0.25]])
    assert rollout.equal_groups() == 1
    texts, completions = rollout.batch(divide_by_deviation=False, experts=False)
    assert texts.experts is None
    np.testing.assert_array_equal(texts.lengths[0], [3, 4, 4, 5])
    np.testing.assert_array_equal(texts.tokens[0, 3, :6], [5, 5, 1, 1, 1, 0])
    # The drawn tokens are targets: position t predicts token t + 1.
    np.testing.assert_array_equal(completions.mask[0, 3, :6], [False, True, True, True, False, False])
    np.testing.assert_allclose(completions.advantages[0], [0.5, -0.5, 0, 0])
    assert texts.tokens.shape == (1, 4, 12)
    texts, completions = rollout.batch(divide_by_deviation=False, experts=False, context_ranks=4)
    assert texts.tokens.shape == (1, 4, 13)
    assert completions.mask.shape == (1, 4, 12)


@pytest.mark.slow
def test_an_update_on_a_mesh_is_that_on_one_device() -> None:
    found = run_simulated(Path(__file__).parent / "simulated_policy.py")
    assert found["norm"] > 1e-3
    assert max(found["log_probs"], found["terms"], found["entropy"]) < 2e-5
    assert found["moments"] < 2e-3
