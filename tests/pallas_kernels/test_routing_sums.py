"""Checks sums, bounds and statistics of routing where a small mistake stays hidden: bfloat16 rows, full padding."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels.grouped_matmul.alignment import align
from pallas_kernels.routing import reference

TOKENS, CHOSEN, EXPERTS, WIDTH = 16, 8, 12, 128


@pytest.fixture(scope="module")
def moved():
    """Returns bfloat16 rows, float32 gates, a bfloat16 gradient of the output, and the permutation."""
    rng = np.random.default_rng(0)
    index = jnp.asarray(np.argsort(rng.random((TOKENS, EXPERTS)), axis=1)[:, :CHOSEN], jnp.int32)
    x, out_bar = (jnp.asarray(rng.normal(size=(TOKENS, WIDTH)), jnp.bfloat16) for _ in range(2))
    _, order = pk.permute(x, index, EXPERTS)
    rows = jnp.asarray(rng.normal(size=(TOKENS * CHOSEN, WIDTH)), jnp.bfloat16)
    return rows, jnp.asarray(rng.random((TOKENS, CHOSEN)), jnp.float32), out_bar, order


def of_tokens(rows, order):
    return np.asarray(rows, np.float64)[np.asarray(order.row_of_slot)].reshape(TOKENS, CHOSEN, WIDTH)


def test_combine_rounds_its_sum_once(moved):
    """Half a step of bfloat16 is at most 2^-8 of a number; eight additions in bfloat16 would each err by as much."""
    rows, gate, _, order = moved
    exact = np.einsum("tk,tkd->td", np.asarray(gate, np.float64), of_tokens(rows, order))
    got = np.asarray(pk.combine(rows, gate, order), np.float64)
    assert np.all(np.abs(got - exact) <= np.abs(exact) * 2**-8 * 1.0001 + 1e-5)


def test_gradients_of_combine_are_summed_in_float32(moved):
    rows, gate, out_bar, order = moved
    _, pull = jax.vjp(lambda rows, gate: pk.combine(rows, gate, order), rows, gate)
    rows_bar, gate_bar = pull(out_bar)
    bar = np.asarray(out_bar, np.float64)
    np.testing.assert_allclose(gate_bar, np.einsum("td,tkd->tk", bar, of_tokens(rows, order)), rtol=1e-4, atol=1e-4)
    assert gate_bar.dtype == jnp.float32
    exact = bar[:, None] * np.asarray(gate, np.float64)[..., None]
    assert np.all(np.abs(of_tokens(rows_bar, order) - exact) <= np.abs(exact) * 2**-8 * 1.0001)


def test_gradient_of_permute_rounds_its_sum_once(moved):
    rows, _, x, order = moved
    index = jnp.searchsorted(jnp.cumsum(order.group_sizes), order.row_of_slot, side="right").reshape(TOKENS, CHOSEN)
    _, pull = jax.vjp(lambda x: pk.permute(x, index, EXPERTS)[0], x)
    (x_bar,) = pull(rows)
    exact = of_tokens(rows, order).sum(axis=1)
    assert np.all(np.abs(np.asarray(x_bar, np.float64) - exact) <= np.abs(exact) * 2**-8 * 1.0001 + 1e-5)


def spread(total: int, groups: int):
    """Yields all sizes of `groups` groups with `total` members."""
    for ends in itertools.combinations_with_replacement(range(total + 1), groups - 1):
        yield np.diff([0, *ends, total])


@pytest.mark.parametrize(("total", "groups", "granule"), [(1, 1, 4), (5, 2, 4), (7, 3, 4), (2, 5, 3), (9, 3, 1)])
def test_room_for_the_worst_distribution_and_no_more(total: int, groups: int, granule: int):
    """Every distribution of rows over groups fits when each group is padded, and one of them fills the layout."""
    padded = [int((-(-sizes // granule) * granule).sum()) for sizes in spread(total, groups)]
    assert reference.row_bound(total, groups, granule) == max(padded)
    worst = next(sizes for sizes, size in zip(spread(total, groups), padded, strict=True) if size == max(padded))
    layout = align(total, jnp.asarray(worst, jnp.int32), granule)
    assert layout.source.shape == (max(padded),)
    np.testing.assert_array_equal(np.sort(layout.source[layout.source < total]), np.arange(total))


def test_many_experts_times_many_pairs_do_not_overflow():
    """A sort by expert * pairs + pair is int32; where that product could pass 2^31 the experts are sorted alone."""

    def sorted_operands(pairs: int, experts: int) -> list[int]:
        index = jax.ShapeDtypeStruct((pairs // 8, 8), jnp.int32)
        jaxpr = jax.make_jaxpr(lambda index: reference.expert_order(index, experts, 1))(index)
        return [len(equation.invars) for equation in all_equations(jaxpr.jaxpr) if equation.primitive.name == "sort"]

    assert sorted_operands(2**22, 511) == [1]
    assert sorted_operands(2**22, 512) == [2]
    assert sorted_operands(2**23, 511) == [2]


def all_equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            if hasattr(value, "jaxpr"):
                yield from all_equations(value.jaxpr)


def test_statistics_leave_the_bias_out_without_groups():
    """f_i counts the largest affinities (Eq. 18), also where only a bias makes the choice another one."""
    logits = jnp.asarray(np.random.default_rng(2).normal(size=(1, 9, 6)), jnp.float32)
    bias = jnp.asarray([5.0, 0, 0, 0, 0, -5.0])
    gates = pk.gate(logits, bias, num_experts_per_tok=2)
    counts = np.bincount(np.argsort(-np.asarray(logits[0]), axis=1)[:, :2].ravel(), minlength=6)
    np.testing.assert_allclose(gates.selection_fraction[0], 6 / (2 * 9) * counts, rtol=1e-6)
    assert int(gates.load[0]) == 9
    assert int(gates.load[5]) == 0


def test_a_sequence_of_padding_alone_has_finite_statistics_and_gradients():
    logits = jnp.asarray(np.random.default_rng(3).normal(size=(2, 4, 6)), jnp.float32)
    mask = jnp.asarray([[True] * 4, [False] * 4])

    def total(logits):
        gates = pk.gate(logits, None, num_experts_per_tok=2, token_mask=mask)
        return jnp.sum(gates.affinity_mean * jnp.arange(6.0)), gates

    (_, gates), gradient = jax.value_and_grad(total, has_aux=True)(logits)
    assert int(gates.load.sum()) == 8
    np.testing.assert_array_equal(gates.affinity_mean[1], 0)
    np.testing.assert_array_equal(gates.selection_fraction[1], 0)
    np.testing.assert_array_equal(gradient[1], 0)
    assert np.isfinite(gradient).all()


def test_tiny_affinities_keep_their_proportions():
    """Gates of a token sum to one, however small the affinities of its experts are."""
    logits = jnp.full((1, 1, 4), -30.0) + jnp.asarray([0.0, np.log(3.0), -9.0, -9.0])
    gates = pk.gate(logits, None, num_experts_per_tok=2)
    np.testing.assert_allclose(gates.gate[0, 0], [0.75, 0.25], rtol=1e-5)
