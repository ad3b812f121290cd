"""Checks what ranks send and sum, with ranks that `jax.vmap` names: no devices, and float64 sums as the oracle."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

import pallas_kernels as pk
from dsv3_jax.config import ModelConfig
from dsv3_jax.precision.dispatch import DispatchFormat
from dsv3_jax.precision.prepared import QuantizedRows
from dsv3_jax.precision.tiles import dequantize, quantize
from dsv3_jax.sharding.expert_hops import Hop, Route, collect, dispatch
from dsv3_jax.sharding.fsdp_gather import gather_over_fsdp
from dsv3_jax.sharding.mesh import AXES, MeshConfig
from dsv3_jax.sharding.placed_experts import _to_physical
from dsv3_jax.sharding.rules import AxisRules, _spec

RANKS = 4


def test_weight_gradients_are_summed_over_ranks_in_float32() -> None:
    """64 gradients in bfloat16 are added exactly; additions in bfloat16 would lose the small ones."""
    ranks, width = 64, 8
    shards = jnp.asarray(np.random.default_rng(0).normal(size=(ranks, 2, width)), jnp.float32)

    def on_a_rank(shard, slope):
        def loss(shard):
            whole = gather_over_fsdp(shard, 0, jnp.dtype(jnp.bfloat16), in_axes=1)
            return jnp.sum((whole * slope).astype(jnp.float32)), whole

        return jax.grad(loss, has_aux=True)(shard)

    slopes = np.random.default_rng(1).normal(size=(ranks, 2 * ranks, width))
    slopes[0] += 300.0  # beside which the others are small
    slopes = jnp.asarray(slopes, jnp.bfloat16)
    gradients, whole = jax.vmap(on_a_rank, axis_name="fsdp")(shards, slopes)
    assert gradients.dtype == jnp.float32
    assert whole.dtype == jnp.bfloat16
    wanted = np.asarray(slopes, np.float64).sum(axis=0).reshape(ranks, 2, width)
    np.testing.assert_allclose(gradients, wanted, rtol=1e-6)
    gathered = np.asarray(shards.astype(jnp.bfloat16), np.float32).reshape(2 * ranks, width)
    np.testing.assert_array_equal(np.asarray(whole[3], np.float32), gathered)


def exchanged(hop: Hop, function):
    """Calls `function(rows of a rank, their route)` on four ranks that send one row to every rank."""
    rows = jnp.asarray(np.random.default_rng(2).normal(size=(RANKS, RANKS, 64)), jnp.float32)
    ids = jnp.arange(1, RANKS + 1)[:, None]
    return rows, jax.vmap(lambda rows: function(rows, Route.of(hop, ids)), axis_name="expert")(rows)


def rounded(rows, form: DispatchFormat) -> np.ndarray:
    tiles = quantize(rows.reshape(-1, rows.shape[-1]), (1, form.tile), form.number_format, power_of_two=True)
    return np.asarray(dequantize(tiles)).reshape(rows.shape)


@pytest.mark.parametrize("tokens", ["e4m3", "e5m2"])
def test_tokens_and_gradients_are_sent_each_in_its_own_format(tokens: str) -> None:
    other = {"e4m3": "e5m2", "e5m2": "e4m3"}[tokens]
    forms = DispatchFormat(32, tokens), DispatchFormat(32, other)
    hop = Hop(ranks=RANKS, peers=RANKS, most=1, behind=1, tokens=forms[0], gradients=forms[1])

    def there(rows, route):
        arrived = dispatch(hop, rows, jnp.ones((RANKS, 1)), route, 0)[0]
        assert isinstance(arrived, QuantizedRows)
        return dequantize(arrived.tiles)

    rows, arrived = exchanged(hop, there)
    np.testing.assert_array_equal(arrived, rounded(rows, forms[0]).swapaxes(0, 1))
    assert not np.array_equal(rounded(rows, forms[0]), rounded(rows, forms[1]))

    def gradient_of_results(rows, route):
        out, pull = jax.vjp(lambda results: collect(hop, results, route, 0), rows)
        return out, pull(rows)[0]

    rows, (back, gradient) = exchanged(hop, gradient_of_results)
    np.testing.assert_array_equal(back, rows.swapaxes(0, 1))  # results are sent unrounded
    np.testing.assert_array_equal(gradient, rounded(rows, forms[1]).swapaxes(0, 1))


def test_an_axis_is_used_only_where_all_axes_together_divide() -> None:
    sizes = dict(zip(AXES, (3, 1, 4, 1, 1, 1), strict=True))
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))

    def spec(size: int) -> PartitionSpec:
        return _spec(("embed",), (size,), mesh, AxisRules())

    assert spec(24) == PartitionSpec(("fsdp", "stage"))
    assert spec(20) == PartitionSpec("fsdp")  # 3 does not divide it
    assert spec(4 * 9 // 2) == PartitionSpec("stage")  # 4 does not divide 18
    assert spec(5) == PartitionSpec(None)
    two = AbstractMesh((2, 1, 4, 1, 1, 1), AXES)
    assert _spec(("embed",), (4,), two, AxisRules()) == PartitionSpec("fsdp")  # 8 does not


def test_one_stage_per_layer_is_allowed() -> None:
    model = ModelConfig.preset("tiny", num_hidden_layers=4, first_k_dense_replace=0)
    MeshConfig(stage=4).check(model, 1)


def test_copies_of_an_expert_take_turns() -> None:
    """Checks that each copy of an expert, one to three, serves equally many of its tokens."""
    copies, counts = jnp.asarray([[0, -1, -1], [1, 2, -1], [3, 4, 5]]), jnp.asarray([1, 2, 3])
    index = jnp.broadcast_to(jnp.arange(3), (12, 3))
    zeros = jnp.zeros((1,))
    gates = pk.Gates(index, jnp.ones((12, 3)), jnp.zeros(3, jnp.int32), zeros, zeros)
    chosen = np.asarray(_to_physical(gates, copies, counts).expert_index)
    assert np.bincount(chosen.ravel()).tolist() == [12, 6, 6, 4, 4, 4]
