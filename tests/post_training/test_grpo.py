"""Checks of the GRPO objective and its gradient against loops in float64, term by term."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.errors import ConfigError
from dsv3_jax.post_training.grpo import Completions, GRPOConfig, group_advantages, grpo_terms

N, T, LONGEST = 6, 5, 8


def example(seed: int = 0) -> tuple[np.ndarray, Completions]:
    random = np.random.default_rng(seed)
    lengths = np.asarray([5, 1, 3, 4, 2, 5])
    mask = np.arange(T) < lengths[:, None]
    log_probs, old, drawn, reference = (np.log(random.uniform(0.2, 0.9, (N, T))) for _ in range(4))
    for values in (log_probs, old, drawn, reference):
        values[~mask] = np.nan  # padding must not matter
    return log_probs, Completions(
        mask=jnp.asarray(mask),
        advantages=jnp.asarray(random.normal(size=N) * [1, 1, 1, 1, 1, 0], jnp.float32),
        old=jnp.asarray(old, jnp.float32),
        drawn=jnp.asarray(drawn, jnp.float32),
        reference=jnp.asarray(reference, jnp.float32),
        overlong=jnp.asarray([False, False, True, False, False, False]),
    )


def by_hand(log_probs: np.ndarray, c: Completions, config: GRPOConfig) -> dict[str, float]:
    """Returns J's terms from loops over completions and tokens."""
    lengths = [int(row.sum()) for row in np.asarray(c.mask)]
    total = {"loss": 0.0, "kl": 0.0, "clipped": 0.0, "drawn_difference": 0.0}

    def add(weight: float, log_ratio: float, log_from_reference: float, advantage: float, correction: float) -> None:
        ratio = math.exp(log_ratio)
        clipped = min(max(ratio, 1 - config.clip_below), 1 + config.clip_above)
        gain = min(ratio * advantage, clipped * advantage)
        kl = math.exp(log_from_reference) - log_from_reference - 1
        total["loss"] -= weight * (correction * gain - config.kl_weight * kl)
        total["kl"] += weight * kl
        outside = ratio > 1 + config.clip_above if advantage > 0 else ratio < 1 - config.clip_below
        total["clipped"] += weight * (outside and advantage != 0)

    for i in range(N):
        new, old, drawn, ref = (
            np.asarray(values, np.float64)[i, : lengths[i]] for values in (log_probs, c.old, c.drawn, c.reference)
        )
        total["drawn_difference"] += np.abs(old - drawn).sum() / sum(lengths)
        if bool(c.overlong[i]) and not config.count_overlong:
            continue
        advantage = float(c.advantages[i])
        largest = config.largest_correction or math.inf
        if config.ratio == "sequence":
            correction = min(math.exp((old - drawn).sum()), largest) if config.largest_correction else 1.0
            add(1 / N, (new - old).sum(), (ref - new).sum(), advantage, correction)
            continue
        weight = {"completion": 1 / (N * lengths[i]), "token": 1 / sum(lengths), "longest": 1 / (N * LONGEST)}
        for t in range(lengths[i]):
            correction = min(math.exp(old[t] - drawn[t]), largest) if config.largest_correction else 1.0
            add(weight[config.per], new[t] - old[t], ref[t] - new[t], advantage, correction)
    return total


def terms_of(log_probs, c: Completions, config: GRPOConfig):
    tokens = jnp.sum(c.mask).astype(jnp.float32)
    return grpo_terms(
        jnp.asarray(log_probs, jnp.float32),
        c,
        config,
        batch_completions=jnp.float32(N),
        batch_tokens=tokens,
        longest=LONGEST,
    )


CONFIGS = [
    GRPOConfig(ratio="sequence"),
    GRPOConfig(ratio="sequence", largest_correction=1.5, kl_weight=0.5, count_overlong=False),
    GRPOConfig(per="completion"),
    GRPOConfig(per="token", clip_below=0.1, clip_above=0.4),
    GRPOConfig(per="longest", kl_weight=0.0),
    GRPOConfig(per="completion", largest_correction=1.2, kl_weight=0.3, count_overlong=False),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_terms_and_gradient(config: GRPOConfig) -> None:
    log_probs, c = example()
    found, wanted = terms_of(log_probs, c, config), by_hand(log_probs, c, config)
    for name, value in wanted.items():
        assert float(getattr(found, name)) == pytest.approx(value, rel=2e-5, abs=1e-6), name
    gradient = jax.grad(lambda x: terms_of(x, c, config).loss)(jnp.asarray(log_probs, jnp.float32))
    mask = np.asarray(c.mask)
    np.testing.assert_array_equal(np.asarray(gradient)[~mask], 0)
    for i, t in zip(*np.nonzero(mask), strict=True):
        step = 1e-6
        up, down = log_probs.copy(), log_probs.copy()
        up[i, t] += step
        down[i, t] -= step
        slope = (by_hand(up, c, config)["loss"] - by_hand(down, c, config)["loss"]) / (2 * step)
        assert float(gradient[i, t]) == pytest.approx(slope, rel=1e-3, abs=2e-6)


def test_passes_add_up_to_the_batch() -> None:
    log_probs, c = example(1)
    config = GRPOConfig(per="completion", kl_weight=0.1)
    tokens = jnp.sum(c.mask).astype(jnp.float32)
    whole = terms_of(log_probs, c, config)
    halves = [
        grpo_terms(
            jnp.asarray(log_probs[rows], jnp.float32),
            jax.tree.map(lambda x, rows=rows: x[rows], c),
            config,
            batch_completions=jnp.float32(N),
            batch_tokens=tokens,
            longest=LONGEST,
        )
        for rows in (slice(0, 3), slice(3, 6))
    ]
    for name in ("loss", "kl", "clipped", "drawn_difference"):
        assert sum(float(getattr(half, name)) for half in halves) == pytest.approx(
            float(getattr(whole, name)), rel=1e-5
        )


def test_with_one_positive_advantage_and_no_kl_it_is_weighted_sft() -> None:
    """At the old policy the gradient of J is the advantage times that of the log-likelihood."""
    _, c = example(2)
    config = GRPOConfig(per="token", kl_weight=0.0)
    gradient = jax.grad(lambda x: terms_of(x, c, config).loss)(c.old)
    weight = -np.asarray(c.advantages)[:, None] / float(jnp.sum(c.mask))
    np.testing.assert_allclose(gradient, np.where(c.mask, weight, 0), rtol=1e-5)


def test_advantages() -> None:
    rewards = jnp.asarray([[1.0, 0.0, 0.0, 0.5], [0.1, 0.1, 0.1, 0.1], [3.0, 1.0, 2.0, 2.0]])
    wanted = [(row - np.mean(row)) / np.std(row) if np.ptp(row) else 0 * row for row in np.asarray(rewards, np.float64)]
    np.testing.assert_allclose(group_advantages(rewards), wanted, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(group_advantages(rewards)[1], 0)
    plain = group_advantages(rewards, divide_by_deviation=False)
    np.testing.assert_allclose(plain[2], [1, -1, 0, 0], atol=1e-6)


def test_the_estimate_of_kl_is_never_negative_and_right_on_average() -> None:
    """Eq. 27 over draws from the policy estimates KL(policy || reference)."""
    random = np.random.default_rng(0)
    policy, reference = np.asarray([0.5, 0.3, 0.2]), np.asarray([0.2, 0.5, 0.3])
    tokens = random.choice(3, size=(20_000, 1), p=policy)
    logs = jnp.asarray(np.log(policy)[tokens], jnp.float32)
    c = Completions(
        mask=jnp.ones(tokens.shape, bool),
        advantages=jnp.zeros(len(tokens)),
        old=logs,
        drawn=logs,
        reference=jnp.asarray(np.log(reference)[tokens], jnp.float32),
        overlong=jnp.zeros(len(tokens), bool),
    )
    count = jnp.float32(len(tokens))
    found = grpo_terms(logs, c, GRPOConfig(), batch_completions=count, batch_tokens=count, longest=1)
    assert float(found.kl) == pytest.approx(float(np.sum(policy * np.log(policy / reference))), rel=0.03)


@pytest.mark.parametrize("change", [{"clip_below": 0.0}, {"clip_above": math.inf}, {"kl_weight": -1.0}])
def test_impossible_settings_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        GRPOConfig(**change)
