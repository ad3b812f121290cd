"""Checks logits, MTP logits, loss, gradients and greedy text against an independent implementation (tests/golden)."""

from __future__ import annotations

import golden_data
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

V3 = ("v3_yarn_small", "lite_small", "v3_negative_bias")
ALL = (*V3, "v2_groups", "v2_lite")


@pytest.fixture(scope="module", params=ALL)
def golden(request):
    return golden_data.load_golden(request.param)


@pytest.fixture(scope="module")
def model(golden):
    return golden_data.build_model(golden)


@pytest.fixture(scope="module")
def run(golden, model):
    """Returns outputs, loss and gradients of one pass."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    ids = jnp.asarray(golden.io["ids"], jnp.int32)

    @jax.jit
    def run(params):
        def loss(params):
            out = nnx.merge(graph, params, rest)(ids)
            losses = optax.softmax_cross_entropy_with_integer_labels(out.logits[:, :-1], ids[:, 1:])
            return jnp.mean(losses), out

        (value, out), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return out, value, gradients

    return run(params)


def relative_to_spread(ours, theirs):
    return np.max(np.abs(np.asarray(ours) - theirs)) / np.std(theirs)


def test_logits(golden, run):
    assert relative_to_spread(run[0].logits, golden.io["logits"]) < 1e-4


def test_mtp_logits(golden, run):
    assert len(run[0].mtp_logits) == golden.config.num_nextn_predict_layers
    for logits in run[0].mtp_logits:
        assert logits.shape == golden.io["mtp_logits"].shape
        assert relative_to_spread(logits, golden.io["mtp_logits"]) < 1e-4


def test_loss(golden, run):
    assert float(run[1]) == pytest.approx(float(golden.io["loss"][0]), rel=1e-5)


def published_gradients(config, gradients):
    """Returns our gradients in the published layout [out, in], by the names of the stored ones."""
    dense = config.num_dense_layers

    def layer(index):
        blocks, position = ("dense_blocks", index) if index < dense else ("moe_blocks", index - dense)
        return jax.tree.map(lambda leaf: np.asarray(leaf[position]), nnx.to_pure_dict(gradients[blocks]))

    rank = config.kv_lora_rank
    return {
        "grad.embed": np.asarray(gradients["embedding"]["weight"][...]),
        "grad.kv_a_proj.0": layer(0)["attention"]["kv_a"]["weight"],
        "grad.kv_b_proj.1": layer(1)["attention"]["kv_b"]["weight"].reshape(-1, rank),
        "grad.o_proj.2": layer(2)["attention"]["o"]["weight"].reshape(config.hidden_size, -1),
        "grad.router.2": layer(2)["feed_forward"]["router"]["weight"],
    }


def test_gradients(golden, run):
    ours = published_gradients(golden.config, run[2])
    stored = {name: value for name, value in golden.io.items() if name.startswith("grad.")}
    assert ours.keys() == stored.keys()
    for name, theirs in stored.items():
        difference = np.linalg.norm(ours[name] - theirs) / np.linalg.norm(theirs)
        assert difference < 1e-3, name


def test_greedy_text_by_absorbed_decoding(golden, model):
    """The first 16 tokens are read at once, then 32 chosen one by one from the latent cache."""
    expected = golden.io["greedy"].astype(np.int32)
    graph, state = nnx.split(model)

    @jax.jit
    def start(state, prompt):
        model = nnx.merge(graph, state)
        read = model.prefill(prompt, model.init_cache(1, expected.shape[1]))
        return jnp.argmax(model.head(read.hidden[:, -1]), -1), read.cache

    @jax.jit
    def step(state, token, cache, position):
        model = nnx.merge(graph, state)
        read = model.decode(token[:, None], cache, position[None, None])
        return jnp.argmax(model.head(read.hidden[:, -1]), -1), read.cache

    token, cache = start(state, expected[:, :16])
    written = [int(token[0])]
    for position in range(16, expected.shape[1] - 1):
        token, cache = step(state, token, cache, jnp.asarray(position))
        written.append(int(token[0]))
    np.testing.assert_array_equal(written, expected[0, 16:])
