"""Grouped products against a loop over groups in float64, and their gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pallas_kernels as pk
from pallas_kernels.grouped_matmul import reference


def by_loop(lhs, rhs, sizes):
    out, start = np.zeros((lhs.shape[0], rhs.shape[1])), 0
    for g, size in enumerate(sizes):
        out[start : start + size] = lhs[start : start + size].astype(np.float64) @ rhs[g].astype(np.float64).T
        start += size
    return out


CASES = {
    "even": [8, 8, 8, 8],
    "empty groups": [0, 16, 0, 8],
    "one group with everything": [0, 0, 32, 0],
    "rows to spare": [8, 0, 8, 0],
    "nothing": [0, 0, 0, 0],
}


@pytest.fixture(params=["gathered weights", "loop over blocks"])
def both_paths(request, monkeypatch):
    """Small weights are gathered, large ones looped over: every case runs through each."""
    monkeypatch.setattr(reference, "_SMALL_WEIGHTS", 0 if request.param == "loop over blocks" else 10**9)


@pytest.mark.usefixtures("both_paths")
@pytest.mark.parametrize("sizes", CASES.values(), ids=CASES)
def test_product_and_gradients(sizes):
    rng = np.random.default_rng(0)
    lhs, rhs = rng.normal(size=(32, 6)).astype(np.float32), rng.normal(size=(4, 5, 6)).astype(np.float32)
    out_bar = rng.normal(size=(32, 5)).astype(np.float32)
    group_sizes = jnp.asarray(sizes, jnp.int32)
    product = lambda lhs, rhs: pk.grouped_matmul(lhs, rhs, group_sizes, row_alignment=8)  # noqa: E731
    out, vjp = jax.vjp(product, jnp.asarray(lhs), jnp.asarray(rhs))
    np.testing.assert_allclose(out, by_loop(lhs, rhs, sizes), atol=1e-5)
    lhs_bar, rhs_bar = vjp(jnp.asarray(out_bar))
    np.testing.assert_allclose(lhs_bar, by_loop(out_bar, rhs.transpose(0, 2, 1), sizes), atol=1e-5)
    start = 0
    for g, size in enumerate(sizes):
        rows = slice(start, start + size)
        np.testing.assert_allclose(rhs_bar[g], out_bar[rows].T @ lhs[rows], atol=1e-5)
        start += size


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(0, 7), min_size=1, max_size=6), spare=st.integers(0, 5), seed=st.integers(0, 99))
def test_sizes_that_are_no_multiple_of_anything(sizes, spare, seed):
    rng = np.random.default_rng(seed)
    rows = sum(sizes) + spare
    if rows == 0:
        return
    lhs = rng.normal(size=(rows, 4)).astype(np.float32)
    rhs = rng.normal(size=(len(sizes), 3, 4)).astype(np.float32)
    out = pk.grouped_matmul(jnp.asarray(lhs), jnp.asarray(rhs), jnp.asarray(sizes, jnp.int32))
    np.testing.assert_allclose(out, by_loop(lhs, rhs, sizes), atol=1e-5)


def test_bfloat16_is_summed_in_float32():
    rng = np.random.default_rng(3)
    lhs = jnp.asarray(rng.normal(size=(16, 512)), jnp.bfloat16)
    rhs = jnp.asarray(rng.normal(size=(2, 8, 512)), jnp.bfloat16)
    out = pk.grouped_matmul(lhs, rhs, jnp.array([8, 8]), row_alignment=8, out_dtype=jnp.float32)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(
        out, by_loop(np.asarray(lhs, np.float32), np.asarray(rhs, np.float32), [8, 8]), atol=1e-3
    )


def test_preferred_alignment_follows_the_even_share():
    assert pk.preferred_row_alignment(8192, 32) == 64
    assert pk.preferred_row_alignment(8192, 256) == 32
    assert pk.preferred_row_alignment(4, 32) == 1


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"lhs": jnp.zeros((8,))}, ValueError, "lhs must be"),
        ({"rhs": jnp.zeros((2, 5, 7))}, ValueError, "rhs must be"),
        ({"group_sizes": jnp.zeros(3, jnp.int32)}, ValueError, "group_sizes must have shape"),
        ({"group_sizes": jnp.zeros(2)}, TypeError, "group_sizes must hold integers"),
        ({"rhs": jnp.zeros((2, 5, 6), jnp.bfloat16)}, TypeError, "one dtype"),
        ({"row_alignment": 3}, ValueError, "row_alignment must divide"),
        ({"implementation": "tpu"}, ValueError, "tpu"),
    ],
)
def test_wrong_arguments_are_named(change, error, named):
    arguments = {"lhs": jnp.zeros((8, 6)), "rhs": jnp.zeros((2, 5, 6)), "group_sizes": jnp.array([4, 4])} | change
    with pytest.raises(error, match=named):
        pk.grouped_matmul(**arguments)
