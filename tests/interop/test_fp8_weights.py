"""Blocks of 128 x 128: against float64 block by block, ragged blocks, power-of-two scales, and back exactly."""

from __future__ import annotations

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.interop.fp8_weights import E4M3, dequantise, quantise, quantise_with
from dsv3_jax.precision.fp8_weight import Fp8Weight
from pallas_kernels import quantize

SIZES = st.integers(1, 300)


def weights(rows: int, columns: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((rows, columns)) * np.exp(rng.standard_normal((rows, 1)))
    return values.astype(np.float32)


@settings(max_examples=25, deadline=None)
@given(rows=SIZES, columns=SIZES, seed=st.integers(0, 99), power=st.booleans())
def test_against_the_definition(rows: int, columns: int, seed: int, power: bool) -> None:
    w = weights(rows, columns, seed)
    values, scales = quantise(w, power_of_two_scales=power)
    assert values.dtype == E4M3
    assert scales.shape == (-(-rows // 128), -(-columns // 128))
    plain = dequantise(values, scales)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = (slice(i * 128, (i + 1) * 128), slice(j * 128, (j + 1) * 128))
            wanted = np.abs(w[block]).max() / 448
            if power:
                assert 1 <= scales[i, j] / wanted * (1 + 1e-6) < 2 * (1 + 1e-6)
                assert np.log2(scales[i, j]) == np.round(np.log2(scales[i, j]))
            else:
                np.testing.assert_allclose(scales[i, j], wanted, rtol=1e-6)
            # e4m3: 3 bits of mantissa, half a unit off; under 2^-6 half of 2^-9.
            bound = np.maximum(np.abs(w[block].astype(np.float64)) * 2**-4, scales[i, j] * 2**-10)
            assert (np.abs(plain[block] - w[block].astype(np.float64)) <= bound * (1 + 1e-5)).all()
            exact = values[block].astype(np.float64) * np.float64(scales[i, j])
            np.testing.assert_array_equal(plain[block], exact.astype(np.float32))


@pytest.mark.parametrize("power", [False, True])
def test_same_as_on_devices(power: bool) -> None:
    w = weights(256, 384, 3)
    values, scales = quantise(w, power_of_two_scales=power)
    device = quantize(jnp.asarray(w), tile="128x128", power_of_two_scales=power)
    # A compiler may divide by 448 through its reciprocal: the last bit of a scale, hence values on a rounding border.
    np.testing.assert_allclose(scales, device.scales, rtol=2**-22)
    assert (values.view(np.uint8) != np.asarray(device.values).view(np.uint8)).mean() < 1e-3


@settings(max_examples=25, deadline=None)
@given(rows=SIZES, columns=SIZES, seed=st.integers(0, 99), bfloat16=st.booleans())
def test_with_its_scales_a_dequantised_weight_goes_back_exactly(
    rows: int, columns: int, seed: int, bfloat16: bool
) -> None:
    """Any finite bytes and any scales, also ones no quantiser would make; through float32 or bfloat16."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (rows, columns)).astype(np.uint8)
    raw[(raw & 0x7F) == 0x7F] = 0
    scales = np.exp(rng.uniform(-12, 4, (-(-rows // 128), -(-columns // 128)))).astype(np.float32)
    plain = dequantise(raw.view(E4M3), scales)
    if bfloat16:
        plain = plain.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(quantise_with(plain, scales).view(np.uint8), raw)


def test_zeros_and_nan() -> None:
    w = np.zeros((4, 4), np.float32)
    values, scales = quantise(w)
    assert (dequantise(values, scales) == 0).all()
    assert scales[0, 0] == np.finfo(np.float32).smallest_normal
    nan = np.full((4, 4), 0x7F, np.uint8).view(E4M3)
    assert np.isnan(dequantise(nan, scales)).all()


@settings(max_examples=4, deadline=None)
@given(heads=st.integers(1, 5), width=st.integers(1, 90), columns=SIZES, seed=st.integers(0, 99))
def test_kept_weight_stands_in_for_an_array(heads: int, width: int, columns: int, seed: int) -> None:
    """Stacked [2, heads, width, columns] with scales over heads * width rows."""
    layers = [quantise(weights(heads * width, columns, seed + i)) for i in range(2)]
    kept = Fp8Weight(
        jnp.asarray(np.stack([v.reshape(heads, width, columns) for v, _ in layers])),
        jnp.asarray(np.stack([s for _, s in layers])),
        columns,
    )
    plain = np.stack([dequantise(v, s).reshape(heads, width, columns) for v, s in layers])
    assert (kept.shape, kept.ndim, kept.size) == (plain.shape, plain.ndim, plain.size)
    np.testing.assert_array_equal(kept[...].astype(jnp.float32), plain)
    np.testing.assert_array_equal(kept.reshape(2, -1, columns).astype(jnp.float32), plain.reshape(2, -1, columns))
