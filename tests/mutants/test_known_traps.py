"""Re-introduces mistakes that implementations of DeepSeek-V3 have shipped, one by one: each must fail the parity check.

Every mutant changes one thing (a function, a tensor, a configuration field) and must then fail the check that the
unchanged model passes in test_golden.py. A mutant that survived would mean that the suite cannot see the mistake.
Mistakes of training are in tests/training, of checkpoints in tests/interop.
"""

from __future__ import annotations

import dataclasses

import golden_data
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mutable_router import Mistakes, mutable_gate

import pallas_kernels
from dsv3_jax.modules import latent_attention, multi_token, rope
from dsv3_jax.modules.norm import RMSNorm

pytestmark = pytest.mark.mutant
PASSES = 1e-4  # the parity bound of test_golden.py, of the logits' standard deviation


def parity_error(golden, config=None) -> float:
    """Returns the largest error of one row's logits and MTP logits, relative to their spread; infinite for NaN."""
    model = golden_data.build_model(golden, config)
    with jax.disable_jit():  # operations are compiled once for all mutants; a whole program would be compiled for each
        out = model(jnp.asarray(golden.io["ids"][:2], jnp.int32))
    pairs = [(out.logits, golden.io["logits"])]
    pairs += [(logits, golden.io["mtp_logits"]) for logits in out.mtp_logits]
    errors = [np.max(np.abs(np.asarray(ours) - theirs[:2])) / np.std(theirs) for ours, theirs in pairs]
    return float(np.nan_to_num(max(errors), nan=np.inf))


def decoding_error(golden) -> float:
    """Returns the largest error of absorbed decoding's logits, with one row's tokens read into an empty cache."""
    model = golden_data.build_model(golden)
    ids = jnp.asarray(golden.io["ids"][:1], jnp.int32)
    with jax.disable_jit():
        hidden = model.decode(ids, model.init_cache(1, ids.shape[1]), jnp.arange(ids.shape[1])[None]).hidden
        logits = model.head(hidden)
    theirs = golden.io["logits"][:1]
    return float(np.max(np.abs(np.asarray(logits) - theirs)) / np.std(theirs))


@pytest.fixture(scope="module")
def goldens():
    return {name: golden_data.load_golden(name) for name in ("v3_yarn_small", "lite_small", "v3_negative_bias")}


def with_biases(golden, change):
    """Returns the golden data with every router bias replaced by `change(name, bias)`."""
    biases = {name: change(name, value) for name, value in golden.tensors.items() if name.endswith("correction_bias")}
    return dataclasses.replace(golden, tensors=golden.tensors | biases)


def near_five(name, bias):
    """Returns biases around 5, as released ones are; a common offset does not change the choice of experts."""
    return bias - bias.mean() + 5.0


# The router ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["v3_negative_bias", "lite_small"])
def test_the_router_without_mistakes_passes(goldens, monkeypatch, name):
    monkeypatch.setattr(pallas_kernels, "gate", mutable_gate(Mistakes()))
    assert parity_error(goldens[name]) < PASSES


@pytest.mark.parametrize("mistake", [field.name for field in dataclasses.fields(Mistakes)])
def test_router_mutant_is_killed(goldens, monkeypatch, mistake):
    monkeypatch.setattr(pallas_kernels, "gate", mutable_gate(Mistakes(**{mistake: True})))
    golden = goldens["v3_negative_bias"]
    assert parity_error(with_biases(golden, near_five) if mistake == "bias_in_bfloat16" else golden) > PASSES


# Rotary embedding and YaRN --------------------------------------------------------------------------------------


def half_layout(x, rotation):
    """Rotates (x[i], x[i + half]) instead of neighbours."""
    first, second = jnp.split(x, 2, axis=-1)
    middle = (slice(None), slice(None), *(None,) * (x.ndim - 3))
    cos, sin = rotation.cos[middle], rotation.sin[middle]
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)


def without_square(config):
    temperature = rope.attention_temperature(config.rope_scaling.factor, config.rope_scaling.mscale_all_dim)
    return config.qk_head_dim**-0.5 * temperature


def with_mscale(config):
    return config.qk_head_dim**-0.5 * rope.attention_temperature(40.0, config.rope_scaling.mscale) ** 2


def of_the_position_free_part(config):
    temperature = rope.attention_temperature(config.rope_scaling.factor, config.rope_scaling.mscale_all_dim)
    return config.qk_nope_head_dim**-0.5 * temperature**2


@pytest.mark.parametrize(
    ("where", "name", "mutant"),
    [
        (latent_attention, "rotate", half_layout),
        (latent_attention, "rotate", lambda x, rotation: x),
        (latent_attention, "rotate", lambda x, r: rope.rotate(x, r) if x.ndim == 4 else x),
        (latent_attention, "rotate", lambda x, r: rope.rotate(x, rope.Rotation(r.cos, -r.sin)) if x.ndim == 4 else x),
        (latent_attention, "softmax_scale", lambda config: config.qk_head_dim**-0.5),
        (latent_attention, "softmax_scale", without_square),
        (latent_attention, "softmax_scale", with_mscale),
        (latent_attention, "softmax_scale", of_the_position_free_part),
        (rope, "attention_temperature", lambda factor, mscale: 0.1 * np.log(factor) + 1),
    ],
    ids=[
        "half-layout",
        "no-rotation",
        "keys-not-rotated",
        "queries-turned-backwards",
        "mscale-missing",
        "mscale-not-squared",
        "mscale-for-mscale_all_dim",
        "scale-of-nope-width",
        "mscale-ignored",
    ],
)
def test_rotary_mutant_is_killed(goldens, monkeypatch, where, name, mutant):
    monkeypatch.setattr(where, name, mutant)
    assert parity_error(goldens["v3_negative_bias"]) > PASSES


@pytest.mark.parametrize("change", ["no-ramp", "interpolated-everywhere", "cosines-also-scaled"])
def test_yarn_mutant_is_killed(goldens, monkeypatch, change):
    exact_frequencies, exact_rotation = rope.rotary_frequencies, rope.make_rotation

    def frequencies(width, theta, scaling):
        if change == "cosines-also-scaled":
            return exact_frequencies(width, theta, scaling)
        return exact_frequencies(width, theta, None) / (scaling.factor if change != "no-ramp" else 1.0)

    def rotation(config, positions):
        exact = exact_rotation(config, positions)
        times = rope.attention_temperature(40.0, 1.0) if change == "cosines-also-scaled" else 1.0
        return rope.Rotation(exact.cos * times, exact.sin * times)

    monkeypatch.setattr(rope, "rotary_frequencies", frequencies)
    monkeypatch.setattr("dsv3_jax.model.make_rotation", rotation)
    assert parity_error(goldens["v3_negative_bias"]) > PASSES


# Latents and weights ----------------------------------------------------------------------------------------------


def test_norm_epsilon_of_latents_mutant_is_killed(goldens):
    golden = goldens["v3_negative_bias"]
    assert golden.config.rms_norm_eps != golden.config.latent_norm_eps
    assert parity_error(golden, golden.config.replace(latent_norm_eps=golden.config.rms_norm_eps)) > PASSES


@pytest.mark.parametrize("gain", [0.0, 2.0], ids=["gain-missing", "gain-plus-one"])
def test_norm_gain_mutant_is_killed(goldens, monkeypatch, gain):
    exact = RMSNorm.__call__

    def mutant(self, x):
        plain = exact(self, x) / self.weight[...]
        return plain if gain == 0.0 else plain * (self.weight[...] + 1)

    monkeypatch.setattr(RMSNorm, "__call__", mutant)
    assert parity_error(goldens["lite_small"]) > PASSES


@pytest.mark.parametrize(
    "change", ["keys-and-values-by-halves", "rotary-part-first", "gate-and-up-swapped", "rotary-key-normed"]
)
def test_weight_layout_mutant_is_killed(goldens, change):
    golden = goldens["lite_small"]
    config, tensors = golden.config, dict(golden.tensors)
    for name, tensor in golden.tensors.items():
        if change == "keys-and-values-by-halves" and "kv_b_proj" in name:
            keys, values = np.split(tensor, [config.num_attention_heads * config.qk_nope_head_dim])
            by_head = [part.reshape(config.num_attention_heads, -1, tensor.shape[1]) for part in (keys, values)]
            tensors[name] = np.concatenate(by_head, axis=1).reshape(tensor.shape)
        elif change == "rotary-part-first" and "self_attn.q_proj" in name:
            by_head = tensor.reshape(config.num_attention_heads, config.qk_head_dim, -1)
            tensors[name] = np.roll(by_head, -config.qk_rope_head_dim, axis=1).reshape(tensor.shape)
        elif change == "gate-and-up-swapped" and "gate_proj" in name:
            other = name.replace("gate_proj", "up_proj")
            tensors[name], tensors[other] = golden.tensors[other], tensor
        elif change == "rotary-key-normed" and "kv_a_proj" in name:
            rotary = tensor[config.kv_lora_rank :]
            normed = rotary / np.sqrt(np.mean(rotary**2))
            tensors[name] = np.concatenate([tensor[: config.kv_lora_rank], normed])
    assert parity_error(dataclasses.replace(golden, tensors=tensors)) > PASSES


def test_common_offset_of_biases_passes(goldens):
    assert parity_error(with_biases(goldens["v3_negative_bias"], near_five)) < PASSES


def test_bfloat16_bias_mutant_is_killed(goldens):
    def rounded(name, bias):
        return np.asarray(jnp.asarray(near_five(name, bias), jnp.bfloat16), np.float32)

    assert parity_error(with_biases(goldens["v3_negative_bias"], rounded)) > PASSES


def test_zeroed_bias_mutant_is_killed(goldens):
    assert parity_error(with_biases(goldens["v3_negative_bias"], lambda name, bias: 0 * bias)) > PASSES


def test_bias_of_another_layer_mutant_is_killed(goldens):
    golden = goldens["v3_negative_bias"]
    first = next(value for name, value in golden.tensors.items() if name.endswith("correction_bias"))
    assert parity_error(with_biases(golden, lambda name, bias: first)) > PASSES


# Multi-token prediction -----------------------------------------------------------------------------------------


def test_mtp_before_final_norm_mutant_is_killed(goldens):
    golden = goldens["v3_negative_bias"]
    assert parity_error(golden, golden.config.replace(mtp_hidden_after_final_norm=False)) > PASSES


def test_mtp_order_mutant_is_killed(goldens, monkeypatch):
    def hidden_first(self, hidden, embedded):
        return self.projection(jnp.concatenate([self.hidden_norm(hidden), self.embedding_norm(embedded)], -1))

    monkeypatch.setattr(multi_token.MultiTokenModule, "join", hidden_first)
    assert parity_error(goldens["v3_negative_bias"]) > PASSES


@pytest.mark.parametrize("shift", [0, -2], ids=["own-token", "token-after-next"])
def test_mtp_shift_mutant_is_killed(goldens, monkeypatch, shift):
    exact = jnp.roll
    monkeypatch.setattr("dsv3_jax.model.jnp.roll", lambda x, _, axis: exact(x, shift, axis=axis))
    assert parity_error(goldens["v3_negative_bias"]) > PASSES


def test_mtp_first_embedding_zeroed_mutant_is_killed(goldens, monkeypatch):
    exact = multi_token.MultiTokenModule.join
    zeroed = lambda self, hidden, embedded: exact(self, hidden, embedded.at[:, 0].set(0.0))  # noqa: E731
    monkeypatch.setattr(multi_token.MultiTokenModule, "join", zeroed)
    assert parity_error(goldens["v3_negative_bias"]) > PASSES


@pytest.mark.parametrize("other", ["model.norm.weight", None], ids=["main-norm", "no-norm-gain"])
def test_mtp_output_norm_mutant_is_killed(goldens, other):
    golden = goldens["v3_negative_bias"]
    name = f"model.layers.{golden.config.num_hidden_layers}.shared_head.norm.weight"
    value = golden.tensors[other] if other else np.ones_like(golden.tensors[name])
    assert parity_error(dataclasses.replace(golden, tensors=golden.tensors | {name: value})) > PASSES


# Absorbed decoding --------------------------------------------------------------------------------------------------


def test_absorbed_decoding_passes(goldens):
    assert decoding_error(goldens["v3_negative_bias"]) < PASSES


def test_scale_of_latent_width_mutant_is_killed(goldens, monkeypatch):
    def of_cached_width(config):
        return (
            rope.softmax_scale(config) * (config.qk_head_dim / (config.kv_lora_rank + config.qk_rope_head_dim)) ** 0.5
        )

    monkeypatch.setattr(latent_attention, "softmax_scale", of_cached_width)
    assert decoding_error(goldens["v3_negative_bias"]) > PASSES


def test_unrotated_cached_key_mutant_is_killed(goldens, monkeypatch):
    exact = latent_attention.rotate
    monkeypatch.setattr(latent_attention, "rotate", lambda x, r: exact(x, r) if x.ndim == 4 else x)
    assert decoding_error(goldens["v3_negative_bias"]) > PASSES
