"""Checks that blocks whose norms quantize their output compute what norm and quantization one by one compute."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.config import ModelConfig
from dsv3_jax.modules import norm
from dsv3_jax.modules.block import Block, BlockInputs
from dsv3_jax.modules.devices import OneDevice
from dsv3_jax.modules.linear import Linear
from dsv3_jax.modules.rope import make_rotation
from dsv3_jax.precision import Fp8Recipe, Precision, QuantizedRows, quantizes_norms
from dsv3_jax.precision.int8_weight import Int8Weight

HIDDEN = 128


def block(moe: bool, precision: str, **sizes: int) -> Block:
    """Returns a block with norms' gains that differ from 1."""
    config = ModelConfig.preset("tiny", hidden_size=HIDDEN, q_lora_rank=128, initializer_range=0.1, **sizes)
    made = Block(config, moe=moe, dtype=jnp.float32, precision=Precision.preset(precision), rngs=nnx.Rngs(0))
    for name, part in nnx.iter_modules(made):
        if isinstance(part, norm.RMSNorm):
            gains = 1 + 0.2 * np.random.default_rng(len(name)).standard_normal(part.weight.shape)
            part.weight[...] = jnp.asarray(gains, jnp.float32)
    return made


def forward_and_gradients(module: Block, precision: str) -> tuple[jax.Array, Any]:
    """Returns the block's output and the gradients by its input and its parameters."""
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    random = np.random.default_rng(1)
    dtype = Precision.preset(precision).dtype
    h, slope = (jnp.asarray(random.standard_normal((2, 24, HIDDEN)), dtype) for _ in range(2))
    inputs = BlockInputs(make_rotation(module.attention.config, jnp.arange(24)[None].repeat(2, 0)))

    def output(params: nnx.State, h: jax.Array) -> jax.Array:
        return nnx.merge(graph, params, rest)(h, inputs)[0]

    out, pull = jax.vjp(output, params, h)
    return out, pull(slope)


def assert_same_bits_and_near_gradients(got, wanted):
    """Gradients may differ by the order of float32 sums; one that is quantized again may be rounded to a neighbour."""
    np.testing.assert_array_equal(got[0], wanted[0])
    others = jax.tree.leaves(wanted[1])
    for (path, gradient), other in zip(jax.tree_util.tree_leaves_with_path(got[1]), others, strict=True):
        error = np.linalg.norm(np.asarray(gradient) - np.asarray(other)) / (np.linalg.norm(np.asarray(other)) + 1e-30)
        assert error < 1e-3, (jax.tree_util.keystr(path), error)


@pytest.mark.parametrize("recipe", ["fp8,compute_dtype=float32", "fp8,compute_dtype=float32,power_of_two_scales=true"])
def test_two_maps_behind_a_norm_equal_norm_and_quantization_one_by_one(monkeypatch, recipe):
    """The gradient is a sum: of what comes from both maps, a reader of the rows and a residual connection."""
    dtype = jnp.dtype(jnp.float32)
    make: dict[str, Any] = {"scale": 0.1, "dtype": dtype, "precision": Precision.preset(recipe), "rngs": nnx.Rngs(0)}
    maps = [Linear(HIDDEN, HIDDEN, (None, None), devices=OneDevice(), **make) for _ in range(2)]
    graph, weights = nnx.split((norm.RMSNorm(HIDDEN, 1e-6, dtype=dtype), maps))
    random = np.random.default_rng(0)
    x, slope = (jnp.asarray(random.standard_normal((2, 24, HIDDEN)), jnp.float32) for _ in range(2))

    def output(x, weights):
        layer, maps = nnx.merge(graph, weights)
        u, x = layer.beside_residual(x, maps[0], with_rows=True)
        rows = u.rows if isinstance(u, QuantizedRows) else u
        return x + jnp.square(rows) + sum(each(u) for each in maps)

    def run():
        with jax.disable_jit():
            out, pull = jax.vjp(output, x, weights)
            return out, pull(slope)

    quantized = run()
    monkeypatch.setattr(norm, "quantizes_norms", lambda *_: False)
    assert_same_bits_and_near_gradients(quantized, run())


@pytest.mark.slow
@pytest.mark.parametrize(("moe", "sizes"), [(False, {}), (True, {}), (True, {"n_shared_experts": 0})])
def test_blocks_equal_norm_and_quantization_one_by_one(monkeypatch, moe, sizes):
    precision = "fp8,compute_dtype=float32"
    made = block(moe, precision, **sizes)
    quantized = forward_and_gradients(made, precision)
    monkeypatch.setattr(norm, "quantizes_norms", lambda *_: False)
    assert_same_bits_and_near_gradients(quantized, forward_and_gradients(made, precision))


def test_other_recipes_and_formats_have_plain_norms():
    assert quantizes_norms(Fp8Recipe(), 1536)
    assert not quantizes_norms(Fp8Recipe(), 1472)
    for other in (Fp8Recipe(tile=64), Fp8Recipe(forward="none"), Fp8Recipe(cache_activations=False)):
        assert not quantizes_norms(other, 1536)
    layer, dtype = norm.RMSNorm(HIDDEN, 1e-6, dtype=jnp.dtype(jnp.float32)), jnp.dtype(jnp.float32)
    make: dict[str, Any] = {"scale": 0.1, "dtype": dtype, "devices": OneDevice(), "rngs": nnx.Rngs(0)}
    plain, in_int8 = (
        Linear(HIDDEN, HIDDEN, (None, None), precision=Precision.preset(name), **make) for name in ("float32", "fp8")
    )
    in_int8.weight.set_value(Int8Weight.of(in_int8.weight[...], 1))
    for linear in (plain, in_int8):
        assert isinstance(layer.before_linear(jnp.ones((2, HIDDEN)), linear), jax.Array)
