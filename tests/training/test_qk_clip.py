"""Checks QK-clip: the largest attention logits against brute force in float64, and what clipping does to them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import small_model
from small_runs import LENGTH, SETTINGS, VOCABULARY, random_batch, small_run

from dsv3_jax.errors import ConfigError
from dsv3_jax.model import DeepSeekV3, Features
from dsv3_jax.modules.attention_core import largest_logits
from dsv3_jax.modules.rope import make_rotation, rotate
from dsv3_jax.modules.tiled_attention import largest_of_tiles
from dsv3_jax.training.config import LoraConfig
from dsv3_jax.training.qk_clip import LargestLogits, clip_logits
from dsv3_jax.training.state import new_state, split_model
from dsv3_jax.training.step import make_train_step

MODEL = small_run().model.replace(initializer_range=0.4, num_hidden_layers=3, first_k_dense_replace=1)


def brute_force(q: np.ndarray, k: np.ndarray, scale: float, segments: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Returns the largest logit of every head, one pair of a query and a key after the other."""
    largest = np.zeros(q.shape[2])
    for row in range(q.shape[0]):
        for i in range(q.shape[1]):
            for j in range(i + 1):
                if counted[row, i] and segments[row, i] == segments[row, j]:
                    largest = np.maximum(largest, scale * np.sum(q[row, i] * k[row, j], axis=-1))
    return largest


@pytest.mark.parametrize("chunk", [None, 16, 7])
def test_largest_logits_are_those_of_all_visible_pairs(chunk: int | None) -> None:
    random = np.random.default_rng(0)
    q, k = random.normal(size=(2, 2, 37, 3, 8))
    shared = random.normal(size=(2, 37, 4))
    q = np.concatenate([q, random.normal(size=(2, 37, 3, 4))], axis=-1)
    segments = np.cumsum(random.random((2, 37)) < 0.1, axis=1)
    counted = np.arange(37) < np.array([[37], [20]])
    whole = np.concatenate([k, np.broadcast_to(shared[:, :, None], (2, 37, 3, 4))], axis=-1)
    q[1, 30], whole[1, 31] = 50, 50  # a pair that is seen by no counted query
    q32, k32, all32, shared32 = (jnp.asarray(x, jnp.float32) for x in (q, whole[..., :8], whole, whole[:, :, 0, 8:]))
    wanted = brute_force(q, whole, 0.3, segments, counted)
    if chunk is None:
        found = largest_logits(
            q32, k32, shared32, scale=0.3, segment_ids=jnp.asarray(segments), counted=jnp.asarray(counted)
        )
    else:
        found = largest_of_tiles(q32, all32, jnp.asarray(segments), jnp.asarray(counted), 0.3, chunk)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    none = largest_logits(-jnp.ones((1, 4, 1, 2)), jnp.ones((1, 4, 1, 1)), jnp.ones((1, 4, 1)), scale=1.0,
                          segment_ids=None, counted=None)  # fmt: skip
    assert float(none[0]) == 0


def norm(x: np.ndarray, gain: np.ndarray, epsilon: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + epsilon) * gain


def first_layer(model: DeepSeekV3, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns queries and keys of the first layer in float64."""
    block = jax.tree.map(lambda leaf: np.asarray(leaf[0], np.float64), nnx.state(model.dense_blocks))
    weights, config = block["attention"], model.config
    rotation = make_rotation(config, jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape))

    def turn(x: Any) -> np.ndarray:
        return np.asarray(rotate(jnp.asarray(x, jnp.float32), rotation), np.float64)

    def get(name: str) -> Any:
        return weights[name]["weight"].get_value()

    x = np.asarray(model.embedding.weight[...], np.float64)[tokens]
    x = norm(x, block["attention_norm"]["weight"].get_value(), config.rms_norm_eps)
    latent = norm(x @ get("q_a").T, get("q_a_norm"), config.latent_norm_eps)
    plain, rope = np.split(np.einsum("btr,hwr->bthw", latent, get("q_b")), [config.qk_nope_head_dim], axis=-1)
    latent, key_rope = np.split(x @ get("kv_a").T, [config.kv_lora_rank], axis=-1)
    key = np.einsum("btr,hwr->bthw", norm(latent, get("kv_a_norm"), config.latent_norm_eps), get("kv_b"))
    shared = np.broadcast_to(turn(key_rope)[:, :, None], rope.shape)
    return np.concatenate([plain, turn(rope)], -1), np.concatenate([key[..., : plain.shape[-1]], shared], -1)


def test_clipped_heads_have_the_logits_that_are_allowed() -> None:
    """The first layer's inputs do not change, so that its largest logits become min(S, tau) exactly."""
    model = small_model(MODEL, 0)
    skeleton, params, biases = split_model(model)
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, (2, LENGTH))
    segments = np.ones_like(tokens)
    segments[1, 20:] = 0

    @jax.jit
    def features(params: nnx.State) -> Features:
        return skeleton.model(params, biases).features(
            jnp.asarray(tokens), segment_ids=jnp.asarray(segments), isolate_segments=False, measure_logits=True
        )

    before = features(params).largest_logits
    assert before is not None
    assert before.shape == (4, MODEL.num_attention_heads)
    q, k = first_layer(model, tokens)
    scale = MODEL.qk_head_dim**-0.5
    np.testing.assert_allclose(before[0], brute_force(q, k, scale, np.ones_like(tokens), segments > 0), rtol=1e-4)

    threshold = float(jnp.median(before))
    clipped = clip_logits(params, LargestLogits(before), threshold, MODEL)
    after = features(clipped).largest_logits
    assert after is not None
    assert np.sum(np.asarray(before[0]) > threshold) not in (0, before.shape[1])
    np.testing.assert_allclose(after[0], np.minimum(before[0], threshold), rtol=1e-4)

    gamma = np.minimum(1, threshold / np.asarray(before, np.float64))
    nope = MODEL.qk_nope_head_dim
    old, new = (dict(nnx.to_flat_state(tree)) for tree in (params, clipped))
    layers = [(("dense_blocks",), 0), (("moe_blocks",), 0), (("moe_blocks",), 1), (("mtp", 0, "block"), None)]
    for (prefix, index), of_layer in zip(layers, gamma, strict=True):
        for name in ("q_b", "kv_b"):
            path = (*prefix, "attention", name, "weight")
            one, other = (np.asarray(tree[path].get_value(), np.float64) for tree in (old, new))
            one, other = (one, other) if index is None else (one[index], other[index])
            for head, factor in enumerate(of_layer):
                rest = factor if name == "q_b" else 1.0
                np.testing.assert_allclose(other[head, :nope], one[head, :nope] * np.sqrt(factor), rtol=1e-6)
                np.testing.assert_allclose(other[head, nope:], one[head, nope:] * rest, rtol=1e-6)
    for path, leaf in old.items():
        if path[-2] not in ("q_b", "kv_b"):
            np.testing.assert_array_equal(new[path].get_value(), leaf.get_value())


def test_a_step_clips_by_the_largest_logits_of_all_its_passes() -> None:
    run = small_run(ema_decay=0.0, weight_decay=0.0, optimizer="muon")
    model = MODEL.replace(num_hidden_layers=1, num_nextn_predict_layers=0)
    run = dataclasses.replace(run, model=model)
    skeleton, state = new_state(small_model(model, 0), run)
    tokens, segments = random_batch(0, 2, 2)
    measure = functools.partial(skeleton.model(state.params, state.router_biases).features, measure_logits=True)
    of_passes: list[Any] = [measure(part[:, :-1]).largest_logits for part in tokens]
    largest = np.max(np.stack(of_passes), axis=0)
    assert np.any(of_passes[0] > of_passes[1])
    assert np.any(of_passes[0] < of_passes[1])
    threshold = float(np.sort(largest.reshape(-1))[-2])  # one head is clipped
    wanted = clip_logits(state.params, LargestLogits(jnp.asarray(largest)), threshold, model)

    run = dataclasses.replace(run, training=dataclasses.replace(run.training, qk_clip=threshold))
    settings = dataclasses.replace(SETTINGS, learning_rate=jnp.float32(0))
    new, metrics = make_train_step(skeleton, run)(jax.tree.map(jnp.copy, state), tokens, segments, settings)
    assert metrics.largest_logit is not None
    np.testing.assert_allclose(metrics.largest_logit, largest.max(), rtol=1e-5)
    for found, expected in zip(jax.tree.leaves(new.params), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_where_clipping_is_not_possible() -> None:
    run = small_run(qk_clip=100.0, ema_decay=0.0)
    with pytest.raises(ConfigError, match=r"training\.qk_clip 0"):
        dataclasses.replace(run, lora=LoraConfig(rank=2))
    params = nnx.state(small_model(MODEL.replace(num_hidden_layers=1), 0), nnx.Param)
    del params["dense_blocks"]["attention"]["kv_b"]
    with pytest.raises(ConfigError, match="kept in FP8"):
        clip_logits(params, LargestLogits(jnp.zeros((1, MODEL.num_attention_heads))), 1.0, MODEL)
