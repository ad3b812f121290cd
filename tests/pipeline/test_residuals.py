"""Checks what the backward pass of a stage's layers reads from slots, and that no forward pass is computed twice."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.ad_checkpoint import checkpoint_name
from small_models import small_model

from dsv3_jax.config import ModelConfig
from dsv3_jax.data import DataConfig
from dsv3_jax.modules.rematerialisation import REMATERIALISATIONS, rematerialise
from dsv3_jax.pipeline.residuals import SlotLayout, TwoPasses
from dsv3_jax.precision.keeping import KEPT
from dsv3_jax.sharding.mesh import MeshConfig, make_mesh
from dsv3_jax.training.config import RunConfig, TrainingConfig
from dsv3_jax.training.losses import BatchTargets, LossWeights, objective
from dsv3_jax.training.state import split_model
from dsv3_jax.training.step import make_pipelined_gradients

F32, BF16 = jnp.dtype("float32"), jnp.dtype("bfloat16")


def layer(params: Any, others: Any, h: Any) -> tuple[Any, Any]:
    """Two products in bfloat16, the first of which the report's policy keeps; `others` shifts the second's input."""
    first, second = params
    hidden = checkpoint_name(h.astype(BF16) @ first.astype(BF16), KEPT)
    out = jnp.tanh(hidden + others) @ second.astype(BF16)
    return (out.astype(F32), jnp.sum(out.astype(F32) ** 2)), jnp.argmax(hidden)


def arguments() -> tuple[Any, ...]:
    random = np.random.default_rng(0)
    first, second, shift, h = (
        jnp.asarray(random.standard_normal(shape), F32) for shape in ((8, 12), (12, 8), (12,), (5, 8))
    )
    return (first, second), shift.astype(BF16), h


@pytest.mark.parametrize("policy", REMATERIALISATIONS)
def test_both_passes_give_the_gradients_of_the_whole(policy: str) -> None:
    params, others, h = arguments()
    function = rematerialise(layer, policy)
    passes = TwoPasses.of(function, params, others, jax.ShapeDtypeStruct(h.shape, h.dtype))
    bars = (jnp.cos(h), jnp.asarray(0.25))
    outputs, more, residuals = passes.forward(params, others, h)
    found = passes.backward(params, others, jnp.full_like(h, jnp.nan), residuals, bars)

    wanted, pull, index = jax.vjp(lambda params, h: function(params, others, h), params, h, has_aux=True)
    assert jax.tree.all(jax.tree.map(np.array_equal, (outputs, more, found), (wanted, index, pull(bars))))


def test_residuals_are_what_the_policy_keeps_of_the_input() -> None:
    """Never the weights in bfloat16, which both products read; the input alone, and where it says so the product."""
    params, others, h = arguments()
    types = {p: set(TwoPasses.of(rematerialise(layer, p), params, others, h).types) for p in REMATERIALISATIONS}
    assert types["full"] == {((5, 8), F32)}
    assert types["report"] == types["full"] | {((5, 12), BF16)}
    assert not {((8, 12), BF16), ((12, 8), BF16)} & types["none"]


LISTS = st.lists(st.sampled_from([((2,), F32), ((2,), BF16), ((3, 1), F32)]), max_size=5)


@settings(deadline=None, max_examples=30)
@given(LISTS, LISTS, st.lists(st.integers(1, 3), min_size=1, max_size=3), st.integers(0, 2))
def test_residuals_of_a_stage_are_read_as_they_were_written(
    moe: list[Any], dense: list[Any], layers: list[int], dense_layers: int
) -> None:
    """In one of two slots, on every stage; each buffer is full on the stage that needs most."""
    layout = SlotLayout.of(moe, layers, dense, dense_layers)
    fullest = np.zeros(len(layout.types), int)
    for stage, count in enumerate(layers):
        held = [(0, i) for i in range(count)] + [(1, i) for i in range(dense_layers * (stage == 0))]
        buffers = layout.buffers(2)
        values = {}
        for number, (kind, i) in enumerate(held, start=1):
            types = (moe, dense)[kind]
            values[kind, i] = [np.full(shape, 10 * number + j, dtype) for j, (shape, dtype) in enumerate(types)]
            buffers = layout.write(buffers, 1, kind, i, tuple(values[kind, i]))
        for (kind, i), written in values.items():
            for one, other in zip(layout.read(buffers, 1, kind, i), written, strict=True):
                assert np.array_equal(one, other)
        filled = [np.count_nonzero(np.asarray(b, F32)[1].any(tuple(range(1, b.ndim - 1)))) for b in buffers]
        fullest = np.maximum(fullest, filled)
    assert tuple(fullest) == layout.entries


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["none", "report"])
def test_a_pipeline_computes_no_more_than_one_device(policy: str) -> None:
    """By the compiler's count of operations, in which every loop, over ticks as over layers, is one iteration."""
    model = ModelConfig.preset("tiny", num_hidden_layers=2, first_k_dense_replace=1, num_nextn_predict_layers=1)
    passes, length = 2, 32
    training = TrainingConfig(batch_size=passes, micro_batch_size=1, pipeline_schedule="1f1b", rematerialisation=policy)
    data = DataConfig(sequence_length=length, vocab_size=model.vocab_size)
    run = RunConfig(preset="", model=model, data=data, training=training, precision="float32")
    skeleton, params, biases = split_model(small_model(model, 0, remat=policy))
    tokens = jnp.zeros((passes, 1, length + 1), jnp.int32)
    weights = LossWeights(jnp.asarray(0.5), jnp.asarray(0.3))
    targets = BatchTargets.count(tokens + 1, 1, isolate_segments=True)

    def loss(params: Any, tokens: Any, segment_ids: Any) -> Any:
        settings: dict[str, Any] = {"weights": weights, "targets": targets, "balance": training.balance}
        settings |= {"isolate_segments": True, "chunk": training.loss_chunk}
        return objective(skeleton.model(params, biases), tokens, segment_ids, **settings).total

    def operations(function: Any, *arguments: Any) -> float:
        return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]

    once = operations(jax.grad(loss), params, tokens[0], tokens[0] + 1)
    pipelined = make_pipelined_gradients(skeleton, run, make_mesh(MeshConfig(), jax.devices()[:1]))
    # One tick is counted with a forward and a backward pass.
    assert once < operations(pipelined, params, biases, tokens, tokens + 1, weights, targets) < once * 1.05
