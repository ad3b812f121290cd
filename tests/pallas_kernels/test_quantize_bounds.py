"""Checks the edges of FP8 quantisation and of grouped sums: smallest scale, marked infinities, dtypes, formats."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from dsv3_jax.interop.fp8_weights import dequantise, quantise
from dsv3_jax.precision.tiles import quantize as quantize_tiles

SMALLEST = float(np.finfo(np.float32).smallest_normal)


@pytest.mark.parametrize("power_of_two", [False, True])
def test_only_tiles_of_finite_numbers_have_finite_scales(power_of_two: bool) -> None:
    """The scale itself is NaN, so that no reader of scales alone takes the tile for a finite one."""
    x = np.ones((4, 128), np.float32)
    x[1, 5], x[2, 7], x[3, 9] = np.inf, -np.inf, np.nan
    for tile in ("1x128", "128x1"):
        q = pk.quantize(jnp.asarray(x if tile == "1x128" else x.T), tile=tile, power_of_two_scales=power_of_two)
        assert np.isnan(q.scales).ravel().tolist() == [False, True, True, True]
    largest = jnp.full((1, 128), np.finfo(np.float32).max)
    scale = float(pk.quantize(largest, tile="1x128", power_of_two_scales=power_of_two).scales[0, 0])
    assert scale == (2.0**120 if power_of_two else np.float32(np.finfo(np.float32).max) / np.float32(448))


@pytest.mark.parametrize("power_of_two", [False, True])
def test_the_smallest_scale_is_the_smallest_normal_number(power_of_two: bool) -> None:
    """It is that of zeros and of all tiles whose largest magnitude is below 448 of it; those above have their own."""
    amax = np.float32([0, SMALLEST, 100 * SMALLEST, 448 * SMALLEST, 896 * SMALLEST, 1792 * SMALLEST])
    want = np.float32([1, 1, 1, 1, 2, 4]) * np.float32(SMALLEST)
    q = pk.quantize(jnp.asarray(amax)[:, None], tile="1x128", power_of_two_scales=power_of_two)
    np.testing.assert_array_equal(np.asarray(q.scales)[:, 0], want)
    for magnitude, scale in zip(amax, want, strict=True):
        values, scales = quantise(np.full((2, 2), magnitude), power_of_two_scales=power_of_two)
        assert scales.tolist() == [[scale]]
        np.testing.assert_allclose(dequantise(values, scales), magnitude, rtol=2**-4, atol=SMALLEST * 2**-9)


def test_scales_of_another_dtype_are_refused() -> None:
    q = pk.quantize(jnp.ones((4, 128)), tile="1x128")
    narrow = pk.Quantized(q.values, q.scales.astype(jnp.bfloat16), "1x128")
    with pytest.raises(TypeError, match=r"q\.scales must be float32, not bfloat16"):
        pk.dequantize(narrow)


def test_tiles_of_the_right_operand_are_checked() -> None:
    lhs, rhs = pk.quantize(jnp.ones((8, 128)), tile="1x128"), pk.quantize(jnp.ones((2, 4, 128)), tile="1x128")
    sizes = jnp.asarray([4, 4])
    with pytest.raises(ValueError, match="rhs must be in 128x128 tiles, not 1x128"):
        pk.grouped_matmul(lhs, rhs, sizes)
    blocks = pk.quantize(jnp.ones((5, 128)), tile="128x128")
    along = pk.quantize(jnp.ones((5, 128)), tile="1x128")
    with pytest.raises(ValueError, match="rhs must be in 1x128 tiles, not 128x128"):
        pk.grouped_weight_gradient(along, blocks, jnp.asarray([128]), row_alignment=128)


@pytest.mark.parametrize("sizes", [[64, 64], [128, 0]], ids=["even", "all in excess of the even share"])
def test_products_of_bfloat16_are_summed_in_float32(sizes: list[int]) -> None:
    """Sums of 128 positive terms: each of 128 additions in bfloat16 would lose up to 2^-8 of the sum."""
    rng = np.random.default_rng(0)
    lhs, out_bar = (jnp.asarray(rng.uniform(1, 2, (128, 4)), jnp.bfloat16) for _ in range(2))
    group_sizes = jnp.asarray(sizes)
    got = pk.grouped_weight_gradient(out_bar, lhs, group_sizes, row_alignment=8)
    assert got.dtype == jnp.float32
    a, b = np.asarray(out_bar, np.float64), np.asarray(lhs, np.float64)
    ends = np.cumsum(sizes)
    for group, (start, end) in enumerate(zip(ends - sizes, ends, strict=True)):
        np.testing.assert_allclose(got[group], a[start:end].T @ b[start:end], rtol=1e-5)
    rows, weights = (jnp.asarray(rng.uniform(1, 2, shape), jnp.bfloat16) for shape in ((128, 512), (2, 4, 512)))
    out = pk.grouped_matmul(rows, weights, group_sizes, row_alignment=8, out_dtype=jnp.float32)
    wide = np.asarray(weights, np.float64)[np.repeat([0, 1], sizes)]
    np.testing.assert_allclose(out, np.einsum("mk,mnk->mn", np.asarray(rows, np.float64), wide), rtol=1e-5)


@pytest.mark.parametrize(("number_format", "largest", "mantissa"), [("e4m3", 448, 3), ("e5m2", 57344, 2)])
@pytest.mark.parametrize("tile", [(1, 32), (16, 16), (0, 0)])
def test_formats_use_all_of_their_range(number_format, largest, mantissa, tile) -> None:
    """The largest number of a tile becomes the largest of the format, and no other errs by more than half a step."""
    x = jax.random.normal(jax.random.key(0), (32, 64)) * jnp.exp(jax.random.normal(jax.random.key(1), (32, 64)) * 3)
    q = quantize_tiles(x, tile, number_format, power_of_two=False)
    rows, columns = tile if tile != (0, 0) else (32, 64)
    blocks = np.abs(np.asarray(q.values, np.float32)).reshape(32 // rows, rows, 64 // columns, columns)
    assert np.all(blocks.max(axis=(1, 3)) == largest)
    scales = np.repeat(np.repeat(np.asarray(q.scales, np.float64), rows, 0), columns, 1)
    restored = np.asarray(q.values, np.float64) * scales
    smallest = {"e4m3": 2.0**-9, "e5m2": 2.0**-16}[number_format]
    bound = np.maximum(np.abs(np.asarray(x, np.float64)) * 2.0 ** -(mantissa + 1), scales * smallest / 2)
    assert np.all(np.abs(restored - np.asarray(x)) <= bound * (1 + 1e-5))
