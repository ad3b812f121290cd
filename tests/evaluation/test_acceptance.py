"""Checks counts of accepted drafts against greedy drafting with the expanded model, one whole pass per token."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from small_models import small_model

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import UserError
from dsv3_jax.evaluation.acceptance import DraftCounts, count_drafts, measure_acceptance
from dsv3_jax.inference import Engine, EngineConfig, Request
from dsv3_jax.model import DeepSeekV3

pytestmark = pytest.mark.slow

VOCABULARY, LENGTH, NEW, DEPTHS = 5, 32, 16, 2
PROMPTS = [tuple(np.random.default_rng(seed).integers(0, VOCABULARY, 3 + seed).tolist()) for seed in range(6)]
# Drafts of an engine with weights in tiles are computed in int8, those of the expanded model are not.
SHAPES: dict[str, Any] = {
    "top_logprobs": 1,
    "max_sequences": 1,
    "tiled_weights": False,
    "context": LENGTH,
    "page_size": 4,
    "chunk_sizes": (8,),
    "steps": 3,
}


@pytest.fixture(scope="module")
def model() -> DeepSeekV3:
    """Returns a model with so few tokens that its untrained MTP module is often right and often wrong."""
    layers = {"num_hidden_layers": 1, "first_k_dense_replace": 0}
    return small_model(ModelConfig.preset("tiny", vocab_size=VOCABULARY, initializer_range=0.25, **layers), 3)


@nnx.jit
def expanded(model: DeepSeekV3, ids: jax.Array, newest: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the most likely token after each of `ids`, and the two drafts for what follows the `newest`.

    The first draft is Eq. 23's; the second comes from the same module, which reads the first with its own hidden state.
    """
    inputs = model.block_inputs(ids, None, None, isolate_segments=False)
    main = model.features(ids)
    drafted = main.mtp_hidden[0][:, newest - 1]
    first = jnp.argmax(model.head(drafted), axis=-1)
    hidden = main.hidden.at[:, newest].set(drafted)
    embedded = model.embedding(ids.at[:, newest + 1].set(first))
    again = model.multi_token(hidden, hidden, embedded, inputs)[0][0]
    second = jnp.argmax(model.head(again[:, newest]), axis=-1)
    return jnp.argmax(model.head(main.hidden), axis=-1)[0], jnp.stack([first[0], second[0]])


def brute_force(model: DeepSeekV3) -> DraftCounts:
    offered, accepted = np.zeros((NEW, DEPTHS), int), np.zeros((NEW, DEPTHS), int)
    for prompt in PROMPTS:
        ids = np.zeros((1, LENGTH), np.int32)
        ids[0, : len(prompt)] = prompt
        end = len(prompt) + NEW
        for at in range(len(prompt), end):
            ids[0, at] = expanded(model, jnp.asarray(ids), jnp.asarray(at - 1))[0][at - 1]
        at = len(prompt)
        while at < end:
            drafts = np.asarray(expanded(model, jnp.asarray(ids), jnp.asarray(at - 1))[1])
            for depth, draft in enumerate(drafts):
                if at == end:
                    break
                offered[at - len(prompt), depth] += 1
                right = draft == ids[0, at]
                accepted[at - len(prompt), depth] += right
                at += 1
                if not right:
                    break
            else:
                at += 1  # the token after the last draft
    return DraftCounts(offered, accepted)


def test_counts_are_those_of_the_expanded_model(model: DeepSeekV3) -> None:
    engine = Engine(model, EngineConfig(drafts=DEPTHS, compile_at_start=False, **SHAPES))
    found = measure_acceptance(engine, [Request(prompt=prompt, max_new_tokens=NEW) for prompt in PROMPTS])
    want = brute_force(model)
    np.testing.assert_array_equal(found.offered, want.offered)
    np.testing.assert_array_equal(found.accepted, want.accepted)
    assert found.offered.sum(axis=0).tolist() == engine.statistics.drafted
    assert found.accepted.sum(axis=0).tolist() == engine.statistics.accepted
    assert (found.accepted.sum(axis=0) > 0).all()
    assert (found.accepted.sum(axis=0) < found.offered.sum(axis=0)).all()


def test_an_engine_without_drafts_is_refused(model: DeepSeekV3) -> None:
    engine = Engine(model, EngineConfig(drafts=0, compile_at_start=False, **SHAPES))
    with pytest.raises(UserError, match="MTP module"):
        measure_acceptance(engine, [Request(prompt=(1, 2))])


steps = st.lists(st.integers(0, 3), min_size=1, max_size=8)


@given(st.lists(st.tuples(steps, st.booleans()), max_size=4))
def test_counts_of_steps(texts: list[tuple[list[int], bool]]) -> None:
    """Each step accepts some of three drafts; where a text is cut short, its last token is an accepted draft."""
    flags, offered, accepted, written, count = [], [0] * 3, [0] * 3, 0, 0
    for right, cut in texts:
        flags.append([flag for number in right for flag in (*[True] * number, False)])
        cut = cut and right[-1] > 0
        if cut:
            flags[-1].pop()
        count += len(right)
        for index, number in enumerate(right):
            checked = number if cut and index == len(right) - 1 else min(number + 1, 3)
            written += number
            for depth in range(checked):
                offered[depth] += 1
                accepted[depth] += depth < number
    found = count_drafts(flags, 3)
    assert found.offered.sum(axis=0).tolist() == offered
    assert found.accepted.sum(axis=0).tolist() == accepted
    if not texts:
        assert found.offered.shape == (0, 3)
        return
    assert found.tokens_per_step == pytest.approx(1 + written / count)
    firsts, shares = found.groups_of_positions()
    ends = [*firsts[1:], len(found.offered)]
    for first, end, row in zip(firsts, ends, shares, strict=True):
        sums = found.offered[first:end].sum(axis=0), found.accepted[first:end].sum(axis=0)
        for share, all_, right in zip(row, *sums, strict=True):
            assert np.isnan(share) if not all_ else share == pytest.approx(right / all_)
