"""Checks grouped products and their gradients against a loop over groups in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pallas_kernels as pk
from pallas_kernels.grouped_matmul.alignment import align, take_rows


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


@st.composite
def ragged(draw, groups, rows):
    """Draws sizes of `groups` groups with at most `rows` rows; all have one shape, so that examples share a program."""
    ends = sorted(draw(st.lists(st.integers(0, rows), min_size=groups, max_size=groups)))
    return np.diff([0, *ends]).tolist()


@settings(max_examples=20, deadline=None)
@given(sizes=ragged(4, 19), seed=st.integers(0, 99))
def test_sizes_that_are_no_multiple_of_anything(sizes, seed):
    rng = np.random.default_rng(seed)
    lhs, rhs = rng.normal(size=(19, 4)).astype(np.float32), rng.normal(size=(4, 3, 4)).astype(np.float32)
    out = pk.grouped_matmul(jnp.asarray(lhs), jnp.asarray(rhs), jnp.asarray(sizes, jnp.int32))
    np.testing.assert_allclose(out, by_loop(lhs, rhs, sizes), atol=1e-5)


def test_rows_of_small_alignment_are_copied():
    """Where no alignment is promised, the product and the weight gradient copy many rows into blocks and back."""
    sizes = [33, 0, 1, 20]
    rng = np.random.default_rng(6)
    lhs, rhs = rng.normal(size=(64, 4)).astype(np.float32), rng.normal(size=(4, 3, 4)).astype(np.float32)
    out, pull = jax.vjp(
        lambda *operands: pk.grouped_matmul(*operands, jnp.asarray(sizes)), jnp.asarray(lhs), jnp.asarray(rhs)
    )
    np.testing.assert_allclose(out, by_loop(lhs, rhs, sizes), atol=1e-5)
    lhs_bar, rhs_bar = pull(out)
    np.testing.assert_allclose(lhs_bar, by_loop(np.asarray(out), rhs.transpose(0, 2, 1), sizes), atol=1e-4)
    ends = np.cumsum(sizes)
    for g, (start, end) in enumerate(zip(ends - sizes, ends, strict=True)):
        np.testing.assert_allclose(rhs_bar[g], np.asarray(out)[start:end].T @ lhs[start:end], atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(sizes=st.tuples(ragged(4, 19), ragged(4, 19), ragged(4, 19)), seed=st.integers(0, 99))
def test_rows_in_parts_add_up(sizes, seed):
    """Three parts of other sizes each, added to an accumulator."""
    rng = np.random.default_rng(seed)
    lhs, rhs = (rng.normal(size=(3, 19, width)).astype(np.float32) for width in (3, 5))
    before = rng.normal(size=(4, 3, 5)).astype(np.float32)
    wanted = before.astype(np.float64)
    for left, right, of_part in zip(lhs, rhs, sizes, strict=True):
        ends = np.cumsum(of_part)
        for g, (start, end) in enumerate(zip(ends - of_part, ends, strict=True)):
            wanted[g] += left[start:end].astype(np.float64).T @ right[start:end]
    got = pk.grouped_weight_gradient(
        jnp.asarray(lhs), jnp.asarray(rhs), jnp.asarray(sizes), accumulator=jnp.asarray(before)
    )
    np.testing.assert_allclose(got, wanted, atol=1e-4)


def relative_error(got, wanted):
    return np.linalg.norm(np.asarray(got, "f8") - wanted) / np.linalg.norm(wanted)


def fp8_operands(sizes, rows, n, k):
    keys = jax.random.split(jax.random.key(4), 3)
    lhs, out_bar = jax.random.normal(keys[0], (rows, k)), jax.random.normal(keys[2], (rows, n))
    return lhs, jax.random.normal(keys[1], (len(sizes), n, k)), out_bar, jnp.asarray(sizes, jnp.int32)


def plain(q):
    return np.asarray(pk.dequantize(q), "f8")


def test_fp8_forms_are_the_products_of_the_quantised_operands():
    """Product, input gradient and weight gradient agree to float32 rounding; rows past the groups hold garbage."""
    sizes = [128, 0, 256]
    lhs, rhs, out_bar, group_sizes = fp8_operands(sizes, 512, 140, 130)
    qx, qw = pk.quantize(lhs, tile="1x128"), pk.quantize(rhs, tile="128x128")
    promise = {"row_alignment": 128}
    out = pk.grouped_matmul(qx, qw, group_sizes, out_dtype=jnp.float32, **promise)
    assert relative_error(out, by_loop(plain(qx), plain(qw), sizes)) < 1e-6
    rows, columns = pk.quantize_both(out_bar)
    lhs_bar = pk.grouped_matmul(rows, qw.mT, group_sizes, out_dtype=jnp.float32, **promise)
    assert relative_error(lhs_bar, by_loop(plain(rows), plain(qw).transpose(0, 2, 1), sizes)) < 1e-6
    x_columns = pk.requantize_transposed(qx)
    rhs_bar = pk.grouped_weight_gradient(columns, x_columns, group_sizes, **promise)
    wanted = [plain(columns)[:, a:b] @ plain(x_columns)[:, a:b].T for a, b in ((0, 128), (128, 128), (128, 384))]
    assert relative_error(rhs_bar, np.stack(wanted)) < 1e-6
    # They are near the plain product: e4m3 rounds by 1/28 in root mean square, two operands by sqrt(2) times that.
    assert relative_error(out, by_loop(np.asarray(lhs), np.asarray(rhs), sizes)) < 0.05


def test_fp8_rows_of_any_group_size():
    sizes = [3, 0, 20]
    lhs, rhs, _, group_sizes = fp8_operands(sizes, 25, 9, 150)
    qx, qw = pk.quantize(lhs, tile="1x128"), pk.quantize(rhs, tile="128x128")
    out = pk.grouped_matmul(qx, qw, group_sizes)
    assert out.dtype == jnp.bfloat16
    assert relative_error(out, by_loop(plain(qx), plain(qw), sizes)) < 2**-8


def test_masked_layout():
    rng = np.random.default_rng(5)
    lhs, rhs = rng.normal(size=(3, 6, 140)).astype("f4"), rng.normal(size=(3, 5, 140)).astype("f4")
    counts = jnp.array([6, 0, 2])
    wanted = np.einsum("gmk,gnk->gmn", lhs.astype("f8"), rhs)
    for g, count in enumerate(counts):
        wanted[g, count:] = 0
    lhs[1] = np.nan  # rows past the counts are never used
    assert relative_error(pk.masked_grouped_matmul(jnp.asarray(lhs), jnp.asarray(rhs), counts), wanted) < 1e-6
    lhs[1] = 0
    quantized = pk.quantize(jnp.asarray(lhs), tile="1x128"), pk.quantize(jnp.asarray(rhs), tile="128x128")
    assert relative_error(pk.masked_grouped_matmul(*quantized, counts), wanted) < 0.05


@settings(max_examples=20, deadline=None)
@given(sizes=ragged(5, 24), granule=st.sampled_from([3, 8]))
def test_aligned_layout_holds_every_row_once(sizes, granule):
    rows = 24
    layout = align(rows, jnp.asarray(sizes, jnp.int32), granule)
    padded = [-(-size // granule) * granule for size in sizes]
    np.testing.assert_array_equal(layout.group_sizes, padded)
    wanted, start = [], 0
    for size, aligned in zip(sizes, padded, strict=True):
        wanted += [*range(start, start + size), *[rows] * (aligned - size)]
        start += size
    wanted += [rows] * (len(layout.source) - len(wanted))
    np.testing.assert_array_equal(layout.source, wanted)
    back = take_rows(take_rows(jnp.arange(1, rows + 1), layout.source), layout.destination)
    np.testing.assert_array_equal(back, [*range(1, sum(sizes) + 1), *[0] * (rows - sum(sizes))])


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
        ({"lhs": pk.quantize(jnp.zeros((8, 6)), tile="1x128")}, TypeError, "both be Quantized"),
    ],
)
def test_wrong_arguments_are_named(change, error, named):
    arguments = {"lhs": jnp.zeros((8, 6)), "rhs": jnp.zeros((2, 5, 6)), "group_sizes": jnp.array([4, 4])} | change
    with pytest.raises(error, match=named):
        pk.grouped_matmul(**arguments)


def test_wrong_arguments_of_the_other_forms_are_named():
    lhs, sizes = jnp.zeros((8, 6)), jnp.array([4, 4])
    with pytest.raises(ValueError, match="same number of rows"):
        pk.grouped_weight_gradient(lhs, lhs[:4], sizes)
    with pytest.raises(ValueError, match="accumulator must have shape"):
        pk.grouped_weight_gradient(lhs, lhs, sizes, accumulator=lhs)
    with pytest.raises(ValueError, match="lhs must have 3 dimensions"):
        pk.grouped_weight_gradient(lhs, lhs, sizes[None])
    with pytest.raises(ValueError, match="the 2 parts of group_sizes"):
        pk.grouped_weight_gradient(lhs[None], lhs[None], jnp.stack([sizes, sizes]))
    q = pk.quantize(jnp.zeros((5, 128)), tile="1x128")
    with pytest.raises(ValueError, match="multiple of 128 for FP8 operands"):
        pk.grouped_weight_gradient(q, q, sizes)
    with pytest.raises(ValueError, match="lhs must be in 1x128 tiles"):
        pk.grouped_weight_gradient(pk.quantize(jnp.zeros((5, 128)), tile="128x128"), q, sizes, row_alignment=128)
    with pytest.raises(ValueError, match=r"lhs must be \[groups, rows, in\]"):
        pk.masked_grouped_matmul(lhs, jnp.zeros((2, 5, 6)), sizes)
    with pytest.raises(ValueError, match="counts must have shape"):
        pk.masked_grouped_matmul(jnp.zeros((2, 4, 6)), jnp.zeros((2, 5, 6)), sizes[:1])
