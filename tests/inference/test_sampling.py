"""Checks samplers against the distribution they should draw from, computed independently in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.errors import UserError
from dsv3_jax.inference.sampling import GREEDY, Sampler

DRAWS = 4096


def promised(logits: np.ndarray, sampler: Sampler) -> np.ndarray:
    """Returns the distribution by its definition: sort, keep, renormalise, keep, renormalise."""
    scaled = logits.astype(np.float64) / sampler.temperature
    probabilities = np.exp(scaled - scaled.max())
    order = np.argsort(-probabilities, kind="stable")
    keep = order[: sampler.top_k]
    if sampler.top_p is not None:
        mass = np.cumsum(probabilities[keep]) / probabilities[keep].sum()
        keep = keep[: int(np.searchsorted(mass, sampler.top_p)) + 1]
    result = np.zeros_like(probabilities)
    result[keep] = probabilities[keep] / probabilities[keep].sum()
    return result


@pytest.mark.parametrize(
    "sampler",
    [
        Sampler(),
        Sampler(temperature=0.5),
        Sampler(temperature=2.0, top_k=3),
        Sampler(top_p=0.7),
        Sampler(temperature=1.5, top_k=5, top_p=0.8),
        Sampler(top_k=100),
        Sampler(top_p=1e-6),
    ],
    ids=str,
)
def test_draws_follow_the_promised_distribution(sampler: Sampler) -> None:
    logits = np.random.default_rng(3).normal(size=9).astype(np.float32) * 1.5
    keys = jax.random.split(jax.random.key(0), DRAWS)
    drawn = np.asarray(jax.jit(sampler)(jnp.broadcast_to(logits, (DRAWS, 9)), keys))
    want = promised(logits, sampler)
    seen = np.bincount(drawn, minlength=9) / DRAWS
    assert seen[want == 0].sum() == 0
    # Five standard deviations of a binomial proportion fail falsely in about one of a million runs.
    assert (np.abs(seen - want) <= 5 * np.sqrt(want * (1 - want) / DRAWS) + 1e-12).all()


@settings(max_examples=30, deadline=None)
@given(
    logits=st.lists(st.integers(-20, 20), min_size=6, max_size=6, unique=True),
    temperature=st.floats(0.1, 5.0),
    top_k=st.one_of(st.none(), st.integers(1, 8)),
    top_p=st.one_of(st.none(), st.floats(0.05, 1.0)),
)
def test_candidates_are_those_of_the_definition(logits, temperature, top_k, top_p) -> None:
    sampler = Sampler(temperature=temperature, top_k=top_k, top_p=top_p)
    values = np.asarray(logits, np.float32) / 4
    kept, tokens = sampler.filter(jnp.asarray(values)[None])
    probabilities = np.zeros(6)
    probabilities[np.asarray(tokens[0])] = np.asarray(jax.nn.softmax(kept[0]))
    want = promised(values, sampler)
    before_top_p = promised(values, Sampler(temperature=temperature, top_k=top_k))
    edges = np.cumsum(np.sort(before_top_p)[::-1])
    if top_p is not None and np.abs(edges - top_p).min() < 1e-5:
        return  # float32 and float64 may fall on different sides of the threshold
    np.testing.assert_allclose(probabilities, want, atol=2e-6)


def test_greedy_takes_the_first_of_the_largest_and_reads_no_key() -> None:
    logits = jnp.asarray([[0.0, 2.0, 2.0], [5.0, -1.0, 3.0]])
    np.testing.assert_array_equal(GREEDY(logits, None), [1, 0])


def test_rows_draw_independently() -> None:
    """A row's token depends on its own logits and key, not on its neighbours."""
    logits = jax.random.normal(jax.random.key(1), (4, 11))
    keys = jax.random.split(jax.random.key(2), 4)
    together = Sampler(top_p=0.9)(logits, keys)
    alone = [Sampler(top_p=0.9)(logits[i : i + 1], keys[i : i + 1])[0] for i in range(4)]
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -0.1), ("temperature", float("nan")), ("top_k", 0), ("top_p", 0.0), ("top_p", 1.5)],
)
def test_bad_settings_name_the_field(field: str, value: float) -> None:
    with pytest.raises(UserError, match=field):
        Sampler(**{field: value})


def test_sampling_without_a_key_is_refused() -> None:
    with pytest.raises(UserError, match="key"):
        Sampler()(jnp.zeros((1, 3)), None)


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-40, 1e-37, 1e-31, 1e-29, 1e-20])
def test_the_coldest_samplers_take_the_most_likely_token(temperature: float) -> None:
    logits = jnp.asarray([[1.0, 3.0, 2.0, -50.0], [-1e4, -2e4, -9.9e3, -3e4]])
    keys = jax.random.split(jax.random.key(0), 2)
    for options in ({}, {"top_k": 3}, {"top_p": 0.9}):
        assert Sampler(temperature=temperature, **options)(logits, keys).tolist() == [1, 2]
