"""Re-introduces historical mistakes of other training codes; the check that guards against each must notice it.

Every entry replaces one function by the mistaken one; its check holds for our function and must fail for the mutant.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import LENGTH

from dsv3_jax.modules import balance
from dsv3_jax.modules.devices import OneDevice
from dsv3_jax.training import losses, optimizer
from dsv3_jax.training.schedules import REPORT_STEPS, REPORT_TOKENS, TrainingSchedule

VOCABULARY = 11


# Checks. Each takes the function under test and raises AssertionError when it is wrong. ----------------------------


def check_bias_update(update: Callable) -> None:
    load = jnp.asarray([[9, 1, 2], [5, 5, 5]], jnp.int32)
    after = np.asarray(update(jnp.zeros((2, 3)), load, 0.001))
    np.testing.assert_array_equal(after, np.float32(0.001) * np.asarray([[-1, 1, 1], [0, 0, 0]], np.float32))
    assert after.dtype == np.float32
    large = np.asarray(update(jnp.full((1, 2), 5.0), jnp.asarray([[1, 3]]), 0.001))
    np.testing.assert_array_equal(large, np.float32(5) + np.float32(0.001) * np.asarray([[1, -1]], np.float32))


def check_target_weights(weights: Callable) -> None:
    segments = jnp.asarray([[1, 1, 1, 2, 2, 0, 0]])
    np.testing.assert_array_equal(weights(segments, 1, isolate_segments=False), [[1, 1, 1, 1, 0, 0]])
    np.testing.assert_array_equal(weights(segments, 1, isolate_segments=True), [[1, 1, 0, 1, 0, 0]])
    np.testing.assert_array_equal(weights(segments, 2, isolate_segments=False), [[1, 1, 1, 0, 0]])
    np.testing.assert_array_equal(weights(segments, 2, isolate_segments=True), [[1, 0, 0, 0, 0]])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Routing:
    load: Any
    sequence_balance: Any
    batch_balance: Any


@dataclasses.dataclass(frozen=True)
class _Features:
    hidden: Any
    mtp_hidden: tuple
    routing: Any
    largest_logits: None = None


class _Same:
    """A fake head whose logits are the hidden states."""

    devices = OneDevice()

    def __call__(self, hidden: jax.Array) -> jax.Array:
        return hidden


class _KnowsTheFuture:
    """A fake model whose head at depth k, position i is certain of the very token it should predict."""

    head = _Same()

    def __init__(self, tokens: jax.Array, depths: int = 2):
        self._tokens, self._depths = tokens, depths

    def features(self, inputs: jax.Array, *, segment_ids: jax.Array, isolate_segments: bool, **_) -> _Features:
        del segment_ids, isolate_segments
        hidden = [jax.nn.one_hot(self._tokens[:, k + 1 :], VOCABULARY) * 50.0 for k in range(self._depths + 1)]
        assert hidden[0].shape[1] == inputs.shape[1]
        routing = _Routing(jnp.ones((3, 4), jnp.int32), jnp.asarray([1.0, 1.5, 2.0]), jnp.asarray([1.0, 1.1, 1.2]))
        return _Features(hidden[0], tuple(hidden[1:]), routing)


def check_objective(objective: Callable) -> None:
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, VOCABULARY, (2, LENGTH + 1)), jnp.int32)
    segments = jnp.ones_like(tokens)

    def run(model, balance_weight=0.0, mtp_weight=0.3, segments=segments, isolate=False):
        return objective(
            model,
            tokens,
            segments,
            weights=losses.LossWeights(balance=jnp.float32(balance_weight), mtp=jnp.float32(mtp_weight)),
            targets=losses.BatchTargets.count(segments, 2, isolate_segments=isolate),
            balance="sequence",
            isolate_segments=isolate,
            chunk=4096,
        )

    certain = run(_KnowsTheFuture(tokens))
    np.testing.assert_allclose([certain.main, *certain.mtp], 0.0, atol=1e-6)
    np.testing.assert_allclose(run(_KnowsTheFuture(tokens), 0.01).total, 0.01 * 4.5, rtol=1e-5)
    # Heads that know nothing: log V at every position, T-k of them, divided by T.
    ignorant = run(_KnowsTheFuture(jnp.full_like(tokens, VOCABULARY)))
    shares = [1.0, (LENGTH - 1) / LENGTH, (LENGTH - 2) / LENGTH]
    expected = np.log(VOCABULARY) * np.asarray(shares)
    np.testing.assert_allclose([ignorant.main, *ignorant.mtp], expected, rtol=1e-5)
    np.testing.assert_allclose(ignorant.total, expected[0] + 0.3 / 2 * expected[1:].sum(), rtol=1e-5)
    # The same of documents of 4 tokens that are isolated: log V whatever the depth.
    documents = jnp.broadcast_to(1 + jnp.arange(LENGTH + 1) // 4, tokens.shape)
    ignorant = run(_KnowsTheFuture(jnp.full_like(tokens, VOCABULARY)), segments=documents, isolate=True)
    np.testing.assert_allclose([ignorant.main, *ignorant.mtp], np.log(VOCABULARY), rtol=1e-5)


def check_decay_mask(mask: Callable) -> None:
    params = {"embedding": {"weight": 0}, "moe_blocks": {"attention_norm": {"weight": 0}, "o": {"weight": 0}}}
    expected = {"embedding": {"weight": True}, "moe_blocks": {"attention_norm": {"weight": False}}}
    found = mask(params)
    assert found["embedding"] == expected["embedding"]
    assert found["moe_blocks"]["attention_norm"] == {"weight": False}
    assert found["moe_blocks"]["o"] == {"weight": True}


def check_schedule(schedule: TrainingSchedule) -> None:
    assert schedule.rate_at(0.5, 1000 / REPORT_STEPS) == pytest.approx(1.1e-4)
    rates = [schedule.rate_at(tokens / REPORT_TOKENS, 0.5) for tokens in (1e10, 5e12, 12.15e12, 14.5e12, 14.7e12)]
    np.testing.assert_allclose(rates, [2.2e-4, 2.2e-4, 1.21e-4, 2.2e-5, 7.3e-6], rtol=1e-9)
    moments = [schedule.at(tokens / REPORT_TOKENS, 0.5, 15360) for tokens in (1e12, 12e12, 14.5e12)]
    assert [moment.mtp_weight for moment in moments] == [0.3, 0.1, 0.1]
    assert [moment.bias_update_speed for moment in moments] == [0.001, 0.001, 0.0]
    assert {moment.balance_weight for moment in moments} == {1e-4}


# Mistakes ---------------------------------------------------------------------------------------------------------


def bias_never_updated(biases, load, speed):
    """Never updates the bias, which was only declared (MaxText, for months)."""
    return biases


def bias_towards_the_overloaded(biases, load, speed):
    return 2 * biases - balance.update_biases(biases, load, speed)


def bias_in_proportion(biases, load, speed):
    """Changes the bias in proportion to the load's error, which the paper tried and rejected."""
    load = load.astype(jnp.float32)
    return biases + speed * (load.mean(-1, keepdims=True) - load)


def bias_in_bfloat16(biases, load, speed):
    return balance.update_biases(biases.astype(jnp.bfloat16), load, speed).astype(jnp.float32)


def bias_from_a_mean_over_layers(biases, load, speed):
    mean = jnp.mean(load.astype(jnp.float32))
    return biases + speed * jnp.sign(mean - load)


def bias_signs_of_equal_loads(biases, load, speed):
    """Raises biases of equal loads, because the sign of 0 is taken as 1."""
    mean = jnp.mean(load.astype(jnp.float32), -1, keepdims=True)
    return biases + speed * jnp.where(load > mean, -1.0, 1.0)


def padding_is_a_target(segment_ids, ahead, *, isolate_segments):
    return jnp.ones((segment_ids.shape[0], segment_ids.shape[1] - ahead))


def mtp_crosses_documents(segment_ids, ahead, *, isolate_segments):
    return losses.target_weights(segment_ids, ahead, isolate_segments=False)


def only_the_next_document_is_masked(segment_ids, ahead, *, isolate_segments):
    """Compares documents one position ahead, whatever the depth."""
    weights = losses.target_weights(segment_ids, ahead, isolate_segments=False)
    if isolate_segments:
        weights = weights * (segment_ids[:, 1:] == segment_ids[:, :-1])[:, : weights.shape[1]]
    return weights


def _changed(**changes: Callable) -> Callable:
    """Returns the objective with some of its terms replaced, and its total computed from them."""

    def objective(model, tokens, segment_ids, *, weights, targets, **rest):
        terms = losses.objective(model, tokens, segment_ids, weights=weights, targets=targets, **rest)
        given = {"tokens": tokens, "model": model, "terms": terms, "weights": weights, "targets": targets}
        new = {name: change(**given) for name, change in changes.items()}
        terms = dataclasses.replace(terms, **{k: v for k, v in new.items() if k != "total"})
        depth = max(len(terms.mtp), 1)
        total = terms.main + weights.mtp / depth * jnp.sum(terms.mtp) + weights.balance * terms.balance
        return dataclasses.replace(terms, total=new.get("total", total))

    return objective


def _mtp_against(shift: int) -> Callable:
    """Returns MTP losses against targets that are shifted by `shift` positions."""

    def mtp(tokens, model, targets, **_):
        features = model.features(tokens[:, :-1], segment_ids=tokens, isolate_segments=False)
        found = []
        for k, hidden in enumerate(features.mtp_hidden, start=1):
            shifted = jnp.roll(tokens, -shift, axis=1)[:, k + 1 :]
            found.append(jnp.sum(losses.cross_entropies(model.head, hidden, shifted, 4096)) / targets.real)
        return jnp.stack(found)

    return mtp


def _divided_by_all_targets(model, tokens, segment_ids, *, targets, **rest):
    """Divides by all real targets, also where documents are isolated."""
    divisors = jnp.full_like(targets.divisors, targets.real)
    return losses.objective(model, tokens, segment_ids, targets=dataclasses.replace(targets, divisors=divisors), **rest)


def _divided_by_the_main_heads_targets(model, tokens, segment_ids, *, targets, **rest):
    divisors = jnp.full_like(targets.divisors, targets.divisors[0])
    return losses.objective(model, tokens, segment_ids, targets=dataclasses.replace(targets, divisors=divisors), **rest)


MISTAKES: dict[str, tuple[Callable, Any]] = {
    "bias never updated": (check_bias_update, bias_never_updated),
    "bias update with the wrong sign": (check_bias_update, bias_towards_the_overloaded),
    "bias update in proportion to the error": (check_bias_update, bias_in_proportion),
    "bias held in bfloat16": (check_bias_update, bias_in_bfloat16),
    "bias update against the mean of all layers": (check_bias_update, bias_from_a_mean_over_layers),
    "bias update at equal loads": (check_bias_update, bias_signs_of_equal_loads),
    "padding is trained on": (check_target_weights, padding_is_a_target),
    "MTP crosses documents": (check_target_weights, mtp_crosses_documents),
    "MTP masks one boundary only": (check_target_weights, only_the_next_document_is_masked),
    "MTP predicts the token it was given": (check_objective, _changed(mtp=_mtp_against(-1))),
    "MTP predicts one token too far": (check_objective, _changed(mtp=_mtp_against(1))),
    "MTP loss left out": (check_objective, _changed(mtp=lambda terms, **_: terms.mtp * 0)),
    "MTP loss divided by T-k": (
        check_objective,
        _changed(mtp=lambda terms, **_: terms.mtp * LENGTH / (LENGTH - 1 - jnp.arange(2))),
    ),
    "isolated targets divided by all": (check_objective, _divided_by_all_targets),
    "isolated targets divided by those of the main head": (check_objective, _divided_by_the_main_heads_targets),
    "lambda not divided among depths": (
        check_objective,
        _changed(total=lambda terms, weights, **_: terms.main + weights.mtp * terms.mtp.sum() + weights.balance * 4.5),
    ),
    "sequence balance loss silently zero": (check_objective, _changed(balance=lambda **_: jnp.float32(0))),
    "balance loss averaged over layers": (check_objective, _changed(balance=lambda terms, **_: terms.balance / 3)),
    "batch balance for sequence balance": (check_objective, _changed(balance=lambda **_: jnp.float32(3.3))),
    "everything decayed": (check_decay_mask, lambda params: jax.tree.map(lambda _: True, params)),
    "nothing decayed": (check_decay_mask, lambda params: jax.tree.map(lambda _: False, params)),
    "alpha of the legacy configuration": (check_schedule, TrainingSchedule(balance_weight=1e-3)),
    "lambda never lowered": (check_schedule, TrainingSchedule(mtp_weight_after=0.3)),
    "gamma never stopped": (check_schedule, TrainingSchedule(bias_update_until=1.0)),
    "no final constant phase": (check_schedule, TrainingSchedule(last_rate=0.1)),
    "cosine to zero": (check_schedule, TrainingSchedule(cosine_to=0.0)),
}

OURS = {
    check_bias_update: balance.update_biases,
    check_target_weights: losses.target_weights,
    check_objective: losses.objective,
    check_decay_mask: optimizer.decay_mask,
    check_schedule: TrainingSchedule(),
}


@pytest.mark.parametrize("check", OURS, ids=lambda check: check.__name__)
def test_ours_passes(check: Callable):
    check(OURS[check])


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_mistake_is_killed(mistake: str):
    check, mutant = MISTAKES[mistake]
    with pytest.raises(AssertionError):
        check(mutant)
