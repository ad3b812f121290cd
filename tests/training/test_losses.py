"""Checks each term of the objective against float64 loops over the model's own logits."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import small_model

from dsv3_jax.config import ModelConfig
from dsv3_jax.model import DeepSeekV3
from dsv3_jax.modules.devices import OneDevice
from dsv3_jax.modules.parameter import ParameterShape
from dsv3_jax.training.losses import (
    BatchTargets,
    LossTerms,
    LossWeights,
    cross_entropies,
    in_pieces,
    objective,
    prediction_losses,
    target_weights,
)

VOCABULARY, ROWS, LENGTH = 40, 3, 12
LAMBDA, ALPHA = 0.3, 0.7


@functools.cache
def model() -> DeepSeekV3:
    """Returns a model with two MTP depths and weights so large that positions differ."""
    config = ModelConfig.preset(
        "tiny", vocab_size=VOCABULARY, num_hidden_layers=2, num_nextn_predict_layers=2, initializer_range=0.2
    )
    return small_model(config, 1)


@functools.cache
def batch() -> tuple[np.ndarray, np.ndarray]:
    """Returns packed rows: one of a single document, one of two documents, one of a document and padding."""
    tokens = np.random.default_rng(3).integers(0, VOCABULARY, (ROWS, LENGTH + 1)).astype(np.int32)
    segments = np.ones_like(tokens)
    segments[1, 6:] = 2
    segments[2, 9:] = 0
    return tokens, segments


@functools.cache
def logits_and_routing(isolate: bool):
    tokens, segments = batch()
    graph, weights = nnx.split(model())

    @jax.jit
    def run(weights):
        m = nnx.merge(graph, weights)
        features = m.features(tokens[:, :-1], segment_ids=segments[:, :-1], isolate_segments=isolate)
        return [m.head(h) for h in (features.hidden, *features.mtp_hidden)], features.routing

    logits, routing = run(weights)
    return [np.asarray(part, np.float64) for part in logits], jax.device_get(routing)


def brute_force(depth: int, isolate: bool, later: int = 0) -> float:
    """Returns Eq. 24 (at depth 0 the main loss) by loops.

    Positions of whole rows are divided by all T real targets. Inside documents, each a sequence of its own, the mean is
    taken over the targets that the document has at this depth.

    Args:
      later: how many positions after the target the token is that is predicted instead.
    """
    tokens, segments = batch()
    logits = logits_and_routing(isolate)[0][depth]
    total, inside = 0.0, 0
    for b in range(ROWS):
        documents = [np.flatnonzero(segments[b] == n) for n in (1, 2)] if isolate else [np.flatnonzero(segments[b])]
        for document in documents:
            for i, target in zip(document, document[depth + 1 :], strict=False):
                row = logits[b, i]
                wanted = tokens[b, (target + later) % (LENGTH + 1)]
                total -= row[wanted] - np.log(np.sum(np.exp(row - row.max()))) - row.max()
                inside += 1
    return total / (inside if isolate else np.sum(segments[:, 1:] != 0))


@functools.cache
def terms(balance: str, isolate: bool, chunk: int = 4096) -> LossTerms:
    tokens, segments = batch()
    graph, weights = nnx.split(model())

    @jax.jit
    def run(weights):
        return objective(
            nnx.merge(graph, weights),
            tokens,
            segments,
            weights=LossWeights(balance=jnp.float32(ALPHA), mtp=jnp.float32(LAMBDA)),
            targets=BatchTargets.count(jnp.asarray(segments), 2, isolate_segments=isolate),
            balance=balance,  # pyright: ignore[reportArgumentType]
            isolate_segments=isolate,
            chunk=chunk,
        )

    return jax.device_get(run(weights))


@pytest.mark.parametrize("isolate", [False, True])
def test_main_and_mtp_losses_equal_loops(isolate: bool):
    found = terms("sequence", isolate)
    np.testing.assert_allclose(found.main, brute_force(0, isolate), rtol=2e-6)
    np.testing.assert_allclose(found.mtp, [brute_force(1, isolate), brute_force(2, isolate)], rtol=2e-6)


@pytest.mark.parametrize("later", [-1, 1])
def test_the_loops_tell_a_loss_one_position_off(later: int):
    """Losses against a neighbour of the target differ from ours by 100 times the tolerance of the test above."""
    found = terms("sequence", False)
    for depth, ours in enumerate([found.main, *found.mtp]):
        assert abs(brute_force(depth, False, later) - ours) > 1e-3


def test_a_head_that_knows_nothing_loses_log_v_inside_documents():
    """Compares the losses of isolated documents of 2 to 9 tokens with the entropy of equal logits, at every depth."""
    lengths = [2, 3, 4, 5, 9, 8]
    segments = jnp.asarray([np.repeat(np.arange(len(lengths)), lengths)[1:]])  # the first is cut, and is padding
    targets = BatchTargets.count(segments, 2, isolate_segments=True)
    np.testing.assert_array_equal(targets.divisors, [sum(max(n - k, 0) for n in lengths[1:]) for k in (1, 2, 3)])
    assert targets.real == sum(lengths[1:])
    hidden = tuple(jnp.zeros((1, segments.shape[1] - k, 4)) for k in (1, 2, 3))
    tokens = jnp.zeros_like(segments)
    head = _HeadOnly(jnp.zeros((VOCABULARY, 4)))
    main, mtp = prediction_losses(
        head,  # pyright: ignore[reportArgumentType]
        hidden,
        tokens,
        segments,
        targets=targets,
        isolate_segments=True,
        chunk=4096,
    )
    np.testing.assert_allclose([main, *mtp], np.log(VOCABULARY), rtol=1e-6)


def test_the_total_weights_its_terms_as_the_report_does():
    for balance in ("sequence", "batch", "none"):
        found = terms(balance, False)
        routing = logits_and_routing(False)[1]
        in_balance = {
            "sequence": np.sum(routing.sequence_balance, dtype=np.float64),
            "batch": np.sum(routing.batch_balance, dtype=np.float64),
            "none": 0.0,
        }[balance]
        np.testing.assert_allclose(found.balance, in_balance, rtol=1e-5)
        mtp = LAMBDA / 2 * (brute_force(1, False) + brute_force(2, False))
        np.testing.assert_allclose(found.total, brute_force(0, False) + mtp + ALPHA * in_balance, rtol=2e-6)


def test_balance_terms_differ_and_are_near_one_per_layer():
    layers = 3
    for balance in ("sequence", "batch"):
        assert 0.9 * layers < terms(balance, False).balance < 2.5 * layers
    assert terms("sequence", False).balance != terms("batch", False).balance


@pytest.mark.parametrize("chunk", [1, 5, 36])
def test_chunked_cross_entropy_and_its_gradient_equal_the_whole(chunk: int):
    random = np.random.default_rng(0)
    hidden = jnp.asarray(random.normal(size=(2, 18, 32)), jnp.float32)
    targets = jnp.asarray(random.integers(0, VOCABULARY, (2, 18)), jnp.int32)
    weight = jnp.asarray(random.normal(size=(2, 18)), jnp.float32)

    def loss(head_weight, hidden, size):
        m = _HeadOnly(head_weight)
        return jnp.sum(weight * cross_entropies(m, hidden, targets, size))  # pyright: ignore[reportArgumentType]

    head_weight = jnp.asarray(random.normal(size=(VOCABULARY, 32)), jnp.float32)
    whole = jax.value_and_grad(_plain_loss, argnums=(0, 1))(head_weight, hidden, targets, weight)
    pieces = jax.value_and_grad(loss, argnums=(0, 1))(head_weight, hidden, chunk)
    for a, b in zip(jax.tree.leaves(pieces), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("ranks", "chunk"), [(2, 36), (3, 5), (5, 36)])
def test_a_head_whose_rows_are_divided_has_the_same_cross_entropy(ranks: int, chunk: int):
    """An axis of vmap stands for the ranks; the last has rows that are no tokens, whose gradient is zero."""
    random = np.random.default_rng(0)
    hidden = jnp.asarray(random.normal(size=(2, 18, 32)), jnp.float32)
    targets = jnp.asarray(random.integers(0, VOCABULARY, (2, 18)), jnp.int32)
    weight = jnp.asarray(random.normal(size=(2, 18)), jnp.float32)
    head_weight = jnp.asarray(random.normal(size=(VOCABULARY, 32)), jnp.float32)
    size = -(-VOCABULARY // ranks) + 1
    padded = jnp.pad(head_weight, ((0, ranks * size - VOCABULARY), (0, 0)), constant_values=9.0)

    def loss(rows, hidden):
        each = cross_entropies(_HeadOnly(rows), hidden, targets, chunk, rows_over="ranks")  # pyright: ignore[reportArgumentType]
        return jnp.sum(weight * each)

    run = jax.vmap(jax.value_and_grad(loss, argnums=(0, 1)), in_axes=(0, None), axis_name="ranks")
    values, (by_rows, by_hidden) = run(padded.reshape(ranks, size, 32), hidden)
    value, (by_head, by_all) = jax.value_and_grad(_plain_loss, argnums=(0, 1))(head_weight, hidden, targets, weight)
    np.testing.assert_allclose(values, np.full(ranks, value), rtol=2e-5)
    by_rows = by_rows.reshape(-1, 32)
    np.testing.assert_allclose(by_rows[:VOCABULARY], by_head, rtol=2e-5, atol=2e-5)
    assert not by_rows[VOCABULARY:].any()
    np.testing.assert_allclose(by_hidden.sum(axis=0), by_all, rtol=2e-5, atol=2e-5)


@dataclasses.dataclass
class _HeadOnly:
    weight: jax.Array
    devices: OneDevice = OneDevice()
    shape = ParameterShape((VOCABULARY, 32), ("wide", "embed"))

    def __call__(self, hidden: jax.Array) -> jax.Array:
        return hidden @ self.weight.T


def _plain_loss(head_weight, hidden, targets, weight):
    log_p = jax.nn.log_softmax(hidden @ head_weight.T, axis=-1)
    return -jnp.sum(weight * jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=3),
    st.integers(1, 4),
    st.booleans(),
)
def test_target_weights_by_definition(documents: list[list[int]], ahead: int, isolate: bool):
    """Compares target weights, for rows of documents of given lengths, with their definition."""
    width = max(sum(row) for row in documents) + 2
    segments = np.zeros((len(documents), width), np.int32)
    for row, lengths in zip(segments, documents, strict=True):
        row[: sum(lengths)] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    if ahead >= width:
        return
    found = np.asarray(target_weights(jnp.asarray(segments), ahead, isolate_segments=isolate))
    for b in range(len(documents)):
        for i in range(width - ahead):
            target = segments[b, i + ahead]
            wanted = target != 0 and (not isolate or target == segments[b, i])
            assert found[b, i] == wanted


@settings(max_examples=20, deadline=None)
@given(
    rows=st.sampled_from((1, 3)),
    length=st.sampled_from((1, 7, 23)),
    chunk=st.sampled_from((1, 6, 13, 80)),
    parts=st.sampled_from((1, 2, 3)),
)
def test_pieces_are_all_positions_in_their_order(rows: int, length: int, chunk: int, parts: int):
    hidden = jnp.arange(rows * length * 2, dtype=jnp.float32).reshape(rows, length, 2)
    targets = jnp.arange(rows * length).reshape(rows, length)
    largest = []

    def of(hidden, targets):
        largest.append(targets.size)
        return hidden[..., 0] + 0.5 * targets, targets

    with jax.disable_jit():  # whole programs would be compiled for every shape
        found, same = in_pieces(of, hidden, targets, chunk, parts)
    np.testing.assert_array_equal(found, hidden[..., 0] + 0.5 * targets)
    np.testing.assert_array_equal(same, targets)
    assert max(largest) <= max(chunk, 0) + 2 * rows * parts
