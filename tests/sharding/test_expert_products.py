"""Checks the experts of one rank, applied in blocks to the rows of a receive buffer, against every row by itself."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

import pallas_kernels
from dsv3_jax.config import ModelConfig
from dsv3_jax.modules.devices import OneDevice
from dsv3_jax.modules.moe import Experts
from dsv3_jax.precision import Precision
from dsv3_jax.precision.swiglu import swiglu
from dsv3_jax.sharding.expert_products import ExpertsOfRank, apply_at_experts

EXPERTS, ROWS, CHOSEN = 4, 48, 3
FLOAT64 = Precision(name="float64", compute_dtype="float64")


def experts_of(precision: Precision, width: int = 8) -> Experts:
    sizes = {"hidden_size": width, "moe_intermediate_size": width, "n_routed_experts": EXPERTS}
    config = ModelConfig.preset("tiny", **sizes, n_group=1, topk_group=1)
    dtype = jnp.dtype("float64" if precision is FLOAT64 else "float32")
    return Experts.initial(config, dtype=dtype, precision=precision, devices=OneDevice(), rngs=nnx.Rngs(0))


def weights_of(experts: Experts) -> tuple[Any, Any]:
    return 20 * experts.gate_up[...], 20 * experts.down[...]


def one_by_one(rows: Any, gates: Any, ids: Any, weights: Any) -> Any:
    """Returns sum_k gates[m, k] * E_k(row m), every row through all experts."""
    gate_up, down = weights
    outputs = jnp.einsum("edi,emi->med", down, swiglu(jnp.einsum("epid,md->empi", gate_up, rows)))
    chosen = (ids[..., None] == jnp.arange(1, EXPERTS + 1)) * gates[..., None]
    return jnp.einsum("mke,med->md", chosen, outputs)


def with_gradients(function: Any) -> Any:
    """Returns (rows, gates, ids, weights, gradient by the output) -> (output, gradients by rows, gates and weights)."""

    def compute(rows: Any, gates: Any, ids: Any, weights: Any, bar: Any) -> Any:
        out, pull = jax.vjp(lambda rows, gates, weights: function(rows, gates, ids, weights), rows, gates, weights)
        return out, *pull(bar)

    return compute


def blocks_of(precision: Precision, even_load: int, width: int = 8) -> Any:
    experts = ExpertsOfRank(experts_of(precision, width).networks, EXPERTS, even_load)
    return lambda rows, gates, ids, weights: apply_at_experts(experts, (rows, gates, ids), weights)


@functools.cache
def in_blocks(even_load: int) -> Any:
    return jax.jit(with_gradients(blocks_of(FLOAT64, even_load)))


@functools.cache
def plain() -> Any:
    return jax.jit(with_gradients(one_by_one))


@given(
    seed=st.integers(0, 2**20),
    filled=st.integers(0, ROWS),
    busiest=st.integers(1, EXPERTS),
    share=st.sampled_from([0.0, 0.5, 1.0]),
    even_load=st.sampled_from([4, 12, 40, 3 * ROWS]),
)
@settings(max_examples=25, deadline=None)
def test_blocks_equal_every_row_by_itself(seed: int, filled: int, busiest: int, share: float, even_load: int) -> None:
    """Loads are uneven, up to all rows for one expert, or nothing arrives; rows that were not sent are not read."""
    random = np.random.default_rng(seed)
    ids = random.integers(0, EXPERTS + 1, (ROWS, CHOSEN), np.int32)
    ids = np.where(random.random(ids.shape) < share, np.int32(busiest), ids)
    ids[random.permutation(ROWS)[filled:]] = 0
    arrived = (ids > 0).any(axis=1)[:, None]
    with jax.enable_x64(True):
        weights = weights_of(experts_of(FLOAT64))
        rows, bar = random.standard_normal((2, ROWS, 8))
        gates = random.random((ROWS, CHOSEN))
        expected = plain()(rows * arrived, gates, ids, weights, bar)
        not_sent = np.where(arrived, 0, np.nan)
        found = in_blocks(even_load)(rows + not_sent, gates, ids, weights, bar + not_sent)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-10)


def test_fp8_tiles_are_the_same_in_blocks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the alignment of a GPU blocks begin at whole tiles, so only the order in which they are added up differs."""
    monkeypatch.setattr("pallas_kernels.preferred_row_alignment", lambda rows, groups: 128)
    precision = dataclasses.replace(Precision.preset("fp8"), compute_dtype="float32")
    random = np.random.default_rng(0)
    rows, bar = random.standard_normal((2, 400, 128)).astype(np.float32)
    gates = random.random((400, CHOSEN)).astype(np.float32)
    ids, weights = random.integers(0, EXPERTS + 1, gates.shape), weights_of(experts_of(precision, 128))
    several, one = (
        jax.jit(with_gradients(blocks_of(precision, load, 128)))(rows, gates, ids, weights, bar) for load in (200, 1200)
    )
    for found, expected in zip(jax.tree.leaves(several), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * float(np.abs(expected).max()))


def arrays_of(jaxpr: Any) -> Iterator[Any]:
    """Yields the type of every value that a program computes, those of its loops and kernels included."""
    for equation in jaxpr.eqns:
        yield from (variable.aval for variable in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from arrays_of(inner)


@pytest.mark.parametrize("precision", ["float32", "fp8"])
def test_products_are_of_an_even_load_and_not_of_the_buffer(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No array of rows has an entry for every expert of every row of the buffer, of which few are filled.

    Kernels add rows up without such an array, for which a function without one stands here.
    """
    monkeypatch.setattr(
        "pallas_kernels.combine", lambda rows, gate, order: jnp.zeros((len(gate), rows.shape[1]), rows.dtype)
    )
    recipe, buffer, even_load = Precision.preset(precision), 4096, 512
    weights, rows = weights_of(experts_of(recipe, 128)), jnp.zeros((buffer, 128), recipe.dtype)
    ids = jnp.zeros((buffer, EXPERTS), int)
    program = jax.make_jaxpr(with_gradients(blocks_of(recipe, even_load, 128)))
    heights = [
        math.prod(aval.shape[:-1])
        for aval in arrays_of(program(rows, ids.astype(jnp.float32), ids, weights, rows).jaxpr)
        if aval.ndim > 1 and aval.shape[-1] >= 128 and jnp.issubdtype(aval.dtype, jnp.floating)
    ]
    assert max(heights) <= buffer < EXPERTS * buffer


def test_a_block_is_not_larger_than_what_can_arrive() -> None:
    """Where a rank has all experts, as many pairs arrive as under an even load."""
    rows = jnp.zeros((256, 128))
    ids = jnp.zeros((256, EXPERTS), int)
    program = jax.make_jaxpr(blocks_of(Precision.preset("float32"), ids.size, 128))
    experts = weights_of(experts_of(Precision.preset("float32"), 128))
    products = [
        aval.shape[0]
        for aval in arrays_of(program(rows, ids.astype(jnp.float32), ids, experts).jaxpr)
        if aval.shape[1:] == (2 * 128,)
    ]
    alignment = pallas_kernels.preferred_row_alignment(ids.size, EXPERTS)
    assert ids.size <= max(products) <= ids.size + (EXPERTS + 2) * alignment
