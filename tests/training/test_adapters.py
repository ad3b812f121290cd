"""Checks low-rank adapters against the published matrices in float64, and a training step against autodiff."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from simulated import run_simulated
from small_models import small_model
from small_runs import SETTINGS, assert_trees_equal, random_batch, small_run
from test_mesh_axes_alone import check_equal

from dsv3_jax.errors import ConfigError
from dsv3_jax.interop.parameter_tree import arrays
from dsv3_jax.interop.tensor_names import published_tensors
from dsv3_jax.training.adapters import adapted_matrices, peft_config, published_adapters, with_adapters
from dsv3_jax.training.config import LoraConfig
from dsv3_jax.training.losses import BatchTargets, LossWeights, objective
from dsv3_jax.training.state import new_state
from dsv3_jax.training.step import make_train_step

LORA = LoraConfig(rank=2, alpha=6.0, targets="all", experts=True)


def start():
    config = dataclasses.replace(small_run(ema_decay=0.0), lora=LORA)
    skeleton, state = new_state(small_model(config.model, 1), config)
    random = np.random.default_rng(0)

    def value(leaf: jax.Array) -> jax.Array:
        return jnp.asarray(0.1 * random.standard_normal(leaf.shape), jnp.float32)

    return config, skeleton, dataclasses.replace(state, adapters=jax.tree.map(value, state.adapters))


def test_each_published_matrix_gets_its_own_product():
    config, skeleton, state = start()
    before, after = (
        arrays(skeleton.model(params, state.router_biases))
        for params in (state.params, with_adapters(state.params, state.adapters, LORA))
    )
    tensors = published_adapters(state.adapters, config.model, LORA)
    adapted = {tensor.name for tensor in adapted_matrices(config.model, LORA)}
    assert len(tensors) == 2 * len(adapted) > 40
    for tensor in published_tensors(config.model):
        old, new = (np.asarray(tree[tensor.path][tensor.index], np.float64) for tree in (before, after))
        if tensor.name in adapted:
            name = "base_model.model." + tensor.name.removesuffix("weight")
            a, b = (np.asarray(tensors[f"{name}lora_{part}.weight"], np.float64) for part in "AB")
            old = old.reshape(tensor.shape) + 3.0 * b @ a
        np.testing.assert_allclose(new.reshape(old.shape), old, rtol=0, atol=1e-6, err_msg=tensor.name)


@pytest.mark.slow
def test_a_step_follows_the_gradient_and_leaves_all_weights():
    config, skeleton, state = start()
    tokens, segments = random_batch(0, 2, 2)

    @jax.jit
    @jax.grad
    def gradient(adapters):
        terms = objective(
            skeleton.model(with_adapters(state.params, adapters, LORA), state.router_biases),
            tokens.reshape(4, -1),
            segments.reshape(4, -1),
            weights=LossWeights(balance=SETTINGS.balance_weight, mtp=SETTINGS.mtp_weight),
            targets=BatchTargets.count(segments, 1, isolate_segments=False),
            balance="sequence",
            isolate_segments=False,
            chunk=4096,
        )
        return terms.total

    gradients = gradient(state.adapters)
    new, metrics = make_train_step(skeleton, config)(jax.tree.map(jnp.copy, state), tokens, segments, SETTINGS)
    norm = np.sqrt(sum(float(np.sum(np.asarray(leaf, np.float64) ** 2)) for leaf in jax.tree.leaves(gradients)))
    np.testing.assert_allclose(metrics.gradient_norm, norm, rtol=1e-4)
    scale = min(1.0, config.training.gradient_clip / norm)
    for found, leaf in zip(jax.tree.leaves(new.optimizer[1].mu), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(found, 0.1 * scale * np.asarray(leaf), rtol=1e-3, atol=1e-6 * norm)
    assert_trees_equal(new.params, state.params)
    moved = jax.tree.map(lambda n, o: bool(jnp.any(n != o)), new.adapters, state.adapters)
    assert all(jax.tree.leaves(moved))


def test_targets_and_what_peft_reads():
    model = small_run().model
    attention = adapted_matrices(model, LoraConfig(rank=1))
    assert {tensor.name.split(".")[-3] for tensor in attention} == {"self_attn"}
    assert not [t for t in adapted_matrices(model, LoraConfig(rank=1, targets="all")) if ".experts." in t.name]
    config = peft_config(model, LoraConfig(rank=4, alpha=8.0), "base")
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 8.0, "LORA")
    assert "model.layers.0.self_attn.o_proj" in config["target_modules"]
    with pytest.raises(ConfigError, match="no 'w_proj'"):
        adapted_matrices(model, LoraConfig(rank=1, targets="w_proj"))
    with pytest.raises(ConfigError, match="ema_decay must be 0"):
        dataclasses.replace(small_run(), lora=LORA)


@pytest.mark.slow
def test_a_step_on_a_mesh_equals_one_device():
    mesh = "fsdp=2,expert=2"
    check_equal(run_simulated(Path(__file__).with_name("simulated_training.py"), "adapted-small", mesh)[mesh])
