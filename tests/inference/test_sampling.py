"""Checks sampling against the distribution that the settings promise, computed independently in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.errors import UserError
from dsv3_jax.inference.sampling import GREEDY, Sampler, SamplerRows, TextSoFar, adjust, choose, likeliest

VOCABULARY = 80  # more than the candidates that are looked at before everything is sorted
_adjust, _choose = jax.jit(adjust), jax.jit(choose)


def no_text(rows: int, vocabulary: int = VOCABULARY) -> TextSoFar:
    shape = (rows, vocabulary)
    return TextSoFar(jnp.zeros(shape, bool), jnp.zeros(shape, jnp.int32), jnp.zeros(shape))


def promised(logits: np.ndarray, sampler: Sampler) -> np.ndarray:
    """Returns the distribution by its definition: sort, keep, renormalise, keep, renormalise, keep."""
    scaled = logits.astype(np.float64) / sampler.temperature
    probabilities = np.exp(scaled - scaled.max())
    order = np.argsort(-probabilities, kind="stable")
    keep = order[: sampler.top_k]
    if sampler.top_p is not None:
        mass = np.cumsum(probabilities[keep]) / probabilities[keep].sum()
        keep = keep[: int(np.searchsorted(mass, sampler.top_p)) + 1]
    keep = keep[probabilities[keep] >= sampler.min_p]
    result = np.zeros_like(probabilities)
    result[keep] = probabilities[keep] / probabilities[keep].sum()
    return result


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999),
    samplers=st.lists(
        st.builds(
            Sampler,
            temperature=st.floats(0.1, 5.0),
            top_k=st.one_of(st.none(), st.integers(1, 90)),
            top_p=st.one_of(st.none(), st.floats(0.05, 1.0)),
            min_p=st.one_of(st.just(0.0), st.floats(0.001, 0.9)),
        ),
        min_size=3,
        max_size=3,
    ),
)
def test_the_kept_tokens_are_those_of_the_definition(seed: int, samplers: list[Sampler]) -> None:
    logits = np.random.default_rng(seed).normal(size=(3, VOCABULARY)).astype(np.float32) * 2
    kept = np.asarray(_adjust(logits, SamplerRows.of(samplers, [0] * 3), no_text(3)))
    for row, own, sampler in zip(logits, kept, samplers, strict=True):
        want = promised(row, sampler)
        probabilities = np.asarray(jax.nn.softmax(own))
        # float32 and float64 may disagree about a token on a threshold; it is the least likely of those kept.
        wrong = np.isfinite(own) != (want > 0)
        assert wrong.sum() <= 1
        if not wrong.any():
            np.testing.assert_allclose(probabilities, want, atol=2e-6)


def test_draws_follow_the_distribution() -> None:
    draws = 4096
    logits = np.random.default_rng(3).normal(size=9).astype(np.float32) * 1.5
    sampler = Sampler(temperature=1.5, top_k=7, top_p=0.9)
    rows = SamplerRows.of([sampler] * draws, range(draws))
    adjusted = _adjust(np.tile(logits, (draws, 1)), rows, no_text(draws, 9))
    drawn = np.asarray(_choose(adjusted, rows, jnp.zeros(draws, jnp.int32), 0))
    want = promised(logits, sampler)
    seen = np.bincount(drawn, minlength=9) / draws
    assert seen[want == 0].sum() == 0
    # Five standard deviations of a binomial proportion fail falsely in about one of a million runs.
    assert (np.abs(seen - want) <= 5 * np.sqrt(want * (1 - want) / draws) + 1e-12).all()


def test_rows_do_not_depend_on_each_other() -> None:
    """A row is adjusted to the same bits whether another row needs penalties, sorting, or nothing."""
    samplers = [Sampler(top_p=0.9), Sampler(top_k=70), Sampler(repetition_penalty=1.3), GREEDY, Sampler()]
    logits = np.random.default_rng(1).normal(size=(5, VOCABULARY)).astype(np.float32)
    together = np.asarray(_adjust(logits, SamplerRows.of(samplers, [0] * 5), no_text(5)))
    for row, sampler in enumerate(samplers):
        alone = _adjust(np.tile(logits[row], (5, 1)), SamplerRows.of([sampler] * 5, [0] * 5), no_text(5))
        np.testing.assert_array_equal(alone[0], together[row])


def test_penalties_and_bias() -> None:
    logits = np.asarray([[2.0, -2.0, 1.0, 0.5]] * 3, np.float32)
    text = TextSoFar(
        in_prompt=jnp.asarray([[True, True, False, False]] * 3),
        count=jnp.asarray([[0, 0, 2, 0]] * 3),
        bias=jnp.asarray([[0.0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 7.0]]),
    )
    samplers = [
        Sampler(repetition_penalty=2.0),
        Sampler(presence_penalty=0.5, frequency_penalty=0.25),
        Sampler(temperature=0.0, logit_bias=((3, 7.0),)),
    ]
    got = np.asarray(adjust(logits, SamplerRows.of(samplers, [0] * 3), text))
    np.testing.assert_allclose(got, [[1, -4, 0.5, 0.5], [2, -2, 0, 0.5], [2, -2, 1, 7.5]])


def test_greedy_takes_the_first_of_the_largest() -> None:
    rows = SamplerRows.of([GREEDY] * 2, [0, 1])
    logits = jnp.asarray([[0.0, 2.0, 2.0], [5.0, -1.0, 3.0]])
    np.testing.assert_array_equal(choose(logits, rows, jnp.zeros(2, jnp.int32), 0), [1, 0])


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-40, 1e-37, 1e-31, 1e-29, 1e-20])
def test_the_coldest_samplers_take_the_most_likely_token(temperature: float) -> None:
    logits = jnp.asarray([[1.0, 3.0, 2.0, -50.0], [-1e4, -2e4, -9.9e3, -3e4]])
    for options in ({}, {"top_k": 3}, {"top_p": 0.9}):
        rows = SamplerRows.of([Sampler(temperature=temperature, **options)] * 2, [0, 1])
        adjusted = _adjust(logits, rows, no_text(2, 4))
        assert _choose(adjusted, rows, jnp.zeros(2, jnp.int32), 0).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("presence_penalty", float("inf")),
    ],
)
def test_bad_settings_name_the_field(field: str, value: float) -> None:
    with pytest.raises(UserError, match=field):
        Sampler(**{field: value})


def test_the_likeliest_token_is_the_first_of_the_largest_logits() -> None:
    logits = np.asarray([[1, 3, 3, 2], [-np.inf, -np.inf, -1, -np.inf], [-np.inf] * 4, [5, 1, 1, 5]], np.float32)
    np.testing.assert_array_equal(likeliest(jnp.asarray(logits)), np.argmax(logits, axis=1))
    assert 0 <= int(likeliest(jnp.full((1, 4), jnp.nan))[0]) < 4
