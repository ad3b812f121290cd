"""Checks which parts of a model compute in which format, and that decoding has the formats of the FP8 recipe too."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import small_model
from test_fp8_layer import rounded

from dsv3_jax.config import ModelConfig
from dsv3_jax.model import DeepSeekV3
from dsv3_jax.modules.moe import Experts, MixtureOfExperts
from dsv3_jax.precision import Precision

CONFIG = ModelConfig.preset("tiny", vocab_size=64, num_hidden_layers=2, num_nextn_predict_layers=0)


def model_of(precision: str) -> DeepSeekV3:
    return small_model(CONFIG.replace(initializer_range=0.1), 0, precision=Precision.preset(precision))


def test_router_logits_are_float32_in_every_recipe() -> None:
    """Affinities, read from gates that are not normalised, equal those of float64 products of the bfloat16 inputs."""
    config = CONFIG.replace(norm_topk_prob=False, routed_scaling_factor=1.0, initializer_range=0.1)
    for precision in ("bfloat16", "fp8"):
        make = {"dtype": jnp.dtype(jnp.float32), "precision": Precision.preset(precision), "rngs": nnx.Rngs(0)}
        router = MixtureOfExperts(config, **make).router
        random = np.random.default_rng(3)
        router.weight[...] = jnp.asarray(random.normal(size=router.weight.shape), jnp.float32)
        u = jnp.asarray(random.normal(size=(1, 8, config.hidden_size)) / 8, jnp.bfloat16)
        gates = router(u)
        logits = np.asarray(u, np.float64)[0] @ np.asarray(router.weight[...], np.float64).T
        wanted = np.take_along_axis(1 / (1 + np.exp(-logits)), np.asarray(gates.expert_index)[0], axis=1)
        np.testing.assert_allclose(gates.gate[0], wanted, rtol=1e-5)


def test_the_mtp_projection_is_never_fp8() -> None:
    """The projection equals the float64 product; in FP8 it would be percents off."""
    config = CONFIG.replace(num_nextn_predict_layers=1)
    module = small_model(config, 0, precision=Precision.preset("fp8,compute_dtype=float32")).mtp[0]
    random = np.random.default_rng(4)
    hidden, embedded = (random.normal(size=(1, 3, config.hidden_size)) for _ in range(2))
    normed = [x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config.rms_norm_eps) for x in (embedded, hidden)]
    wanted = np.concatenate(normed, axis=-1) @ np.asarray(module.projection.weight[...], np.float64).T
    found = module.join(*(jnp.asarray(x, jnp.float32) for x in (hidden, embedded)))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision", ["float32", "fp8", "fp8,promotion=false", "fp8,forward=none", "fp8,tile=32"])
def test_few_tokens_are_multiplied_as_many_are(precision: str) -> None:
    """Compares experts whose weights are gathered for two tokens with the sorted rows of training, in float32 sums."""
    name = precision if precision == "float32" else f"{precision},compute_dtype=float32"
    blocks = model_of(name).moe_blocks
    graph, state = nnx.split(blocks.feed_forward)
    mixture = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[0], state))
    u = jnp.asarray(np.random.default_rng(1).normal(size=(1, 2, CONFIG.hidden_size)), jnp.float32)
    gates = mixture.router(u)
    assert gates.expert_index.size <= CONFIG.n_routed_experts
    assert isinstance(mixture.experts, Experts)
    many = mixture.experts(u[0], gates)
    few = blocks.feed_forward.experts.of_few(u[0], gates, jnp.ones(2, bool), jnp.int32(0))
    # SwiGLU may move a number between two FP8 ones to the other: one of 2^-4 among the 32 terms of some outputs.
    close = np.abs(few - many) <= 1e-5 * np.abs(many).max()
    assert close.mean() > 0.9
    np.testing.assert_allclose(few, many, atol=2e-2 * np.abs(many).max())
    if precision != "float32":
        plain = small_model(CONFIG.replace(initializer_range=0.1), 0).moe_blocks.feed_forward.experts
        other = plain.of_few(u[0], gates, jnp.ones(2, bool), jnp.int32(0))
        assert (np.linalg.norm(few - other) > 1e-3 * np.linalg.norm(other)) == ("forward=none" not in precision)


def test_absorbed_up_projections_are_rounded_as_the_recipes_weights() -> None:
    """Decoding with weights that numpy has rounded to FP8 before gives the output that it gives without."""
    attention = model_of("fp8,compute_dtype=float32").dense_blocks.attention
    graph, state = nnx.split(attention)
    attention = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[0], state))
    random = np.random.default_rng(2)
    query, latent, rope = (
        jnp.asarray(random.normal(size=shape), jnp.float32)
        for shape in (
            (1, 1, CONFIG.hidden_size),
            (1, 1, 4, CONFIG.kv_lora_rank),
            (1, 1, 4, CONFIG.qk_rope_head_dim),
        )
    )
    model = model_of("float32")
    cache = model.init_cache(1, 4)
    cache = type(cache)(latent, rope)
    positions = jnp.full((1, 1), 3)
    rotation = model.block_inputs(positions, positions, None, isolate_segments=True).rotation

    def decoded() -> np.ndarray:
        return np.asarray(attention.decode(query, rotation, cache, 0, positions)[0])

    own = decoded()
    weight = np.asarray(attention.kv_b.weight[...])
    matrix = rounded(weight.reshape(-1, weight.shape[-1]), (128, 128)).astype(np.float32)
    assert np.linalg.norm(matrix - weight.reshape(matrix.shape)) > 1e-2 * np.linalg.norm(weight)
    attention.kv_b.weight[...] = jnp.asarray(matrix.reshape(weight.shape))
    np.testing.assert_allclose(own, decoded(), atol=1e-5 * np.abs(own).max())
    attention.precision = Precision.preset("float32")
    np.testing.assert_allclose(own, decoded(), atol=1e-5 * np.abs(own).max())
