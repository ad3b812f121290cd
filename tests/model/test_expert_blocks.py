"""Checks the routed experts of a CPU while decoding: their values, equal bits in any company, and no copies."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import small_model

from dsv3_jax.config import ModelConfig
from dsv3_jax.inference.product_weights import for_one_cpu, with_int8_weights
from dsv3_jax.model import DeepSeekV3
from dsv3_jax.modules.expert_blocks import NO_EXPERT, ExpertProducts, apply_experts
from dsv3_jax.modules.moe import Experts
from dsv3_jax.precision import Precision
from dsv3_jax.precision.by_layer import ByLayer
from pallas_kernels import Gates

EXPERTS, WIDTH = 4, 6
CONFIG = ModelConfig.preset("tiny", num_nextn_predict_layers=0, initializer_range=0.2)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 40), st.integers(1, 3), st.floats(0, 8), st.integers(0, 99), st.booleans())
def test_every_token_gets_the_weighted_sum_of_its_experts(tokens: int, chosen: int, skew: float, seed: int, at_once):
    """However unevenly experts are chosen, so that the rows of some do not suffice; some tokens choose none."""
    random = np.random.default_rng(seed)
    u, matrices = random.standard_normal((tokens, WIDTH)), random.standard_normal((EXPERTS, WIDTH, WIDTH))
    liked = random.standard_normal((tokens, EXPERTS)) + skew * np.arange(EXPERTS)
    index = np.argsort(liked, axis=1)[:, :chosen]
    gates = random.random((tokens, chosen))
    nothing = random.random(tokens) < 0.2
    gates[nothing] = 0
    wanted = np.einsum("nk,nkoi,ni->no", gates, matrices[index], u)
    weights = jnp.asarray(matrices, jnp.float32)
    products = ExpertProducts(
        EXPERTS,
        of_one=lambda rows, expert: rows @ weights[expert].T,
        of_all=(lambda rows: jnp.einsum("eri,eoi->ero", rows, weights)) if at_once else None,
        of_rows=(lambda rows, expert: jnp.einsum("si,soi->so", rows, weights[expert])) if at_once else None,
        fewest_rows=1,
    )
    given_ = jnp.where(nothing[:, None], NO_EXPERT, jnp.asarray(index, jnp.int32))
    found = apply_experts(jnp.asarray(u, jnp.float32), given_, jnp.asarray(gates, jnp.float32), products)
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def engine_model(kind: str, config: ModelConfig = CONFIG) -> DeepSeekV3:
    model = small_model(config, 0, precision=Precision.preset("bfloat16" if kind == "bfloat16" else "float32"))
    return with_int8_weights(model) if kind == "int8" else for_one_cpu(model, drafts=False)


@pytest.mark.parametrize("kind", ["tiles", "int8", "bfloat16"])
def test_a_token_gets_the_same_bits_alone_and_among_many(kind: str) -> None:
    """All tokens choose one expert, among others, so that its rows do not suffice in the batched product."""
    model = engine_model(kind)
    experts = model.moe_blocks.feed_forward.experts
    assert isinstance(experts, Experts)
    assert isinstance(experts.gate_up[...], ByLayer)
    random = np.random.default_rng(1)
    u = jnp.asarray(random.standard_normal((40, CONFIG.hidden_size)), model.precision.dtype)
    index = np.stack([np.full(40, 3), random.integers(4, CONFIG.n_routed_experts, 40)], axis=1)
    graph, weights = nnx.split(experts)

    @jax.jit
    def outputs(weights: nnx.State, u: jax.Array, index: jax.Array, gate: jax.Array) -> jax.Array:
        load = jnp.zeros(CONFIG.n_routed_experts, jnp.int32)
        gates = Gates(expert_index=index, gate=gate, load=load, affinity_mean=None, selection_fraction=None)  # pyright: ignore[reportArgumentType]
        return nnx.merge(graph, weights).of_few(u, gates, jnp.ones(len(u), bool), jnp.int32(1))

    gate = jnp.asarray(random.random((40, 2)), jnp.float32)
    together = outputs(weights, u, jnp.asarray(index, jnp.int32), gate)
    assert np.abs(together.astype(jnp.float32)).min(axis=1).max() > 0
    for token in (0, 17, 39):
        part = slice(token, token + 1)
        alone = outputs(weights, u[part], jnp.asarray(index[part], jnp.int32), gate[part])
        np.testing.assert_array_equal(alone, together[part])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_drafts_are_drawn_from_logits_of_int8_weights(precision: str) -> None:
    """They are near the exact logits but not equal to them; without drafts there is no such weight."""
    model = small_model(CONFIG, 0, precision=Precision.preset(precision))
    hidden = jnp.asarray(np.random.default_rng(2).standard_normal((1, 3, CONFIG.hidden_size)), precision)
    exact = np.asarray(model.next_logits(hidden), np.float64)
    found = np.asarray(for_one_cpu(model, drafts=True).draft_logits(hidden), np.float64)
    assert 1e-4 < np.linalg.norm(found - exact) / np.linalg.norm(exact) < 2e-2
    without = np.asarray(for_one_cpu(model, drafts=False).draft_logits(hidden), np.float64)
    assert np.linalg.norm(without - exact) < 1e-5 * np.linalg.norm(exact)


def largest_made(model: DeepSeekV3, rows: int) -> int:
    """Returns the number of elements of the largest array that decoding a token of each row computes or copies."""
    cache = model.init_cache(rows, 8)
    graph, weights = nnx.split(model)
    tokens = jnp.zeros((rows, 1), jnp.int32)

    @jax.jit
    def read(weights: nnx.State, cache: object) -> jax.Array:
        return nnx.merge(graph, weights).decode(tokens, cache, tokens).hidden

    program = read.lower(weights, cache).compile().as_text()
    made = re.findall(r"= \w+\[([\d,]+)\]\S* (?:copy|transpose|fusion|dynamic-slice|convert)\(", program)
    return max(math.prod(int(size) for size in shape.split(",")) for shape in made)


@pytest.mark.parametrize("kind", ["tiles", "int8"])
def test_the_experts_of_a_layer_are_not_copied(kind: str) -> None:
    """Not inside the loop over layers, where XLA would copy what is sliced out of a stack of all layers' experts."""
    config = CONFIG.replace(hidden_size=64, n_routed_experts=32, moe_intermediate_size=128)
    of_a_layer = config.n_routed_experts * config.moe_intermediate_size * config.hidden_size
    assert largest_made(engine_model(kind, config), 16) < of_a_layer


@pytest.mark.parametrize("kind", ["tiles", "int8"])
def test_one_token_gathers_its_own_experts_alone(kind: str) -> None:
    """It is not computed twice, which would gather their weights twice."""
    config = CONFIG.replace(hidden_size=64, n_routed_experts=32, moe_intermediate_size=256)
    of_an_expert = 2 * config.moe_intermediate_size * config.hidden_size  # of gate and up
    assert largest_made(engine_model(kind, config), 1) == config.num_experts_per_tok * of_an_expert
