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
from dsv3_jax.modules.rope import make_rotation
from dsv3_jax.precision import Precision, quantizes_norms

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


@pytest.mark.parametrize(("moe", "sizes"), [(False, {}), (True, {}), (True, {"n_shared_experts": 0})])
def test_output_has_the_same_bits_and_gradients_differ_by_a_rounding(monkeypatch, moe, sizes):
    """In float32 activations: a gradient that is quantized again may be rounded to the neighbour in FP8."""
    precision = "fp8,compute_dtype=float32"
    made = block(moe, precision, **sizes)
    out, gradients = forward_and_gradients(made, precision)
    monkeypatch.setattr(norm, "quantizes_norms", lambda *_: False)
    wanted_out, wanted = forward_and_gradients(made, precision)
    np.testing.assert_array_equal(out, wanted_out)
    for (path, got), other in zip(jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(wanted), strict=True):
        error = np.linalg.norm(np.asarray(got) - np.asarray(other)) / (np.linalg.norm(np.asarray(other)) + 1e-30)
        assert error < 1e-3, (jax.tree_util.keystr(path), error)


def test_other_recipes_and_widths_have_plain_norms():
    report = Precision.preset("fp8")
    assert quantizes_norms(report, 1536)
    assert not quantizes_norms(report, 1472)
    assert not quantizes_norms(Precision.preset("bfloat16"), 1536)
    for change in ("tile=64", "forward=none", "cache_activations=false"):
        assert not quantizes_norms(Precision.preset(f"fp8,{change}"), 1536)
