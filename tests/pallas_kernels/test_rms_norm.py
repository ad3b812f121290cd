"""Checks RMSNorm with its quantization against float64, autodiff and the two operations one after the other."""

import jax
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest
from interpreted import interpreted_hopper

import pallas_kernels as pk
from pallas_kernels.rms_norm import hopper, reference, tpu

EPSILON = 1e-6


def operands(rows, width, dtype=jnp.bfloat16):
    """Returns rows of many magnitudes, one of zeros, a weight, and the gradient of the normed rows."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, width)) * np.exp2(rng.integers(-12, 12, size=(rows, 1)))
    x[3] = 0
    weight = jnp.asarray(1 + 0.3 * rng.normal(size=width), jnp.float32)
    return jnp.asarray(x, dtype), weight, jnp.asarray(rng.normal(size=(rows, width)), dtype)


def float64_norm(x, weight):
    x, weight = np.asarray(x, "f8"), np.asarray(weight, "f8")
    return x / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + EPSILON) * weight


def assert_same_bits(got: pk.Quantized, wanted: pk.Quantized):
    assert got.tile == wanted.tile
    np.testing.assert_array_equal(got.scales, wanted.scales)
    np.testing.assert_array_equal(np.asarray(got.values, "f4"), np.asarray(wanted.values, "f4"))


@pytest.mark.parametrize("power_of_two", [False, True])
def test_the_definition_is_the_norm_and_then_quantization(power_of_two):
    x, weight, _ = operands(200, 384)
    tiles, reciprocal, rows = pk.quantize_rms_norm(
        x, weight, epsilon=EPSILON, power_of_two_scales=power_of_two, with_rows=True
    )
    assert_same_bits(tiles, pk.quantize(rows, tile="1x128", power_of_two_scales=power_of_two))
    np.testing.assert_allclose(np.asarray(rows, "f8"), float64_norm(x, weight), rtol=2**-8)
    mean_squares = np.mean(np.square(np.asarray(x, "f8")), axis=1)
    np.testing.assert_allclose(reciprocal, 1 / np.sqrt(mean_squares + EPSILON), rtol=1e-6)
    alone, _, nothing = pk.quantize_rms_norm(x, weight, epsilon=EPSILON, power_of_two_scales=power_of_two)
    assert nothing is None
    assert_same_bits(alone, tiles)


def test_gradients_equal_autodiff_in_float64():
    x, weight, gradient = operands(200, 384, jnp.float32)
    _, reciprocal, _ = pk.quantize_rms_norm(x, weight, epsilon=EPSILON)
    x_bar, weight_bar = pk.rms_norm_gradient(x, weight, reciprocal, gradient)
    with_sum, _ = pk.rms_norm_gradient(x, weight, reciprocal, gradient, plus=gradient)
    np.testing.assert_allclose(with_sum, x_bar + gradient, rtol=1e-6, atol=1e-6)

    def norm(x, weight):
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=1, keepdims=True) + EPSILON) * weight

    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(operand, "f8")) for operand in (x, weight, gradient)]
        wanted_x, wanted_weight = map(np.asarray, jax.vjp(norm, *wide[:2])[1](wide[2]))
    largest = np.abs(wanted_x).max(axis=1, keepdims=True)
    assert np.max(np.abs(np.asarray(x_bar) - wanted_x) / largest) < 1e-5
    np.testing.assert_allclose(weight_bar, wanted_weight, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("device", ["hopper", "tpu"])
@pytest.mark.parametrize(
    ("rows", "width", "dtype", "with_rows"),
    [(256, 256, "bfloat16", True), (140, 1024, "float32", False), (37, 640, "bfloat16", False)],
)
def test_kernels_equal_the_definition(device, rows, width, dtype, with_rows):
    """Quantized values, scales and normed rows have the same bits; sums of gradients may be added in another order."""
    x, weight, gradient = operands(rows, width, jnp.dtype(dtype))
    reciprocal = reference.reciprocal_rms(x, EPSILON)

    def run(function, *arguments):
        if device == "tpu":
            return function(*arguments, interpret=pltpu.InterpretParams())
        with interpreted_hopper(num_cores=1) as interpret:
            return jax.block_until_ready(function(*arguments, interpret=interpret))

    kernel = hopper if device == "hopper" else tpu
    tiles, normed = run(kernel.quantize_scaled, x, reciprocal, weight, False, with_rows)
    wanted_tiles, wanted = reference.quantize_scaled(x, reciprocal, weight, False, with_rows)
    assert_same_bits(tiles, wanted_tiles)
    if with_rows:
        np.testing.assert_array_equal(np.asarray(normed, "f4"), np.asarray(wanted, "f4"))
    plus = jnp.roll(gradient, 1, axis=0) if with_rows or dtype == "float32" else None
    x_bar, weight_bar = run(kernel.rms_norm_gradient, x, reciprocal, weight, gradient, plus)
    wanted_x, wanted_weight = reference.rms_norm_gradient(x, reciprocal, weight, gradient, plus)
    assert x_bar.dtype == x.dtype
    error = np.abs(np.asarray(x_bar, "f4") - np.asarray(wanted_x, "f4"))
    largest = np.abs(np.asarray(wanted_x, "f4")).max(axis=1, keepdims=True)
    assert np.max(error / largest) < (2**-8 if dtype == "bfloat16" else 1e-5)
    np.testing.assert_allclose(weight_bar, wanted_weight, rtol=1e-5, atol=1e-4)


def test_bad_input_is_named():
    x, weight, gradient = operands(8, 256)
    with pytest.raises(ValueError, match=r"x must be \[M, d\] with d a multiple of 128, not \(8, 192\)"):
        pk.quantize_rms_norm(x[:, :192], weight[:192], epsilon=EPSILON)
    with pytest.raises(ValueError, match=r"weight must have shape \(256,\)"):
        pk.quantize_rms_norm(x, weight[:128], epsilon=EPSILON)
    with pytest.raises(TypeError, match="x must be float32 or bfloat16, not int32"):
        pk.quantize_rms_norm(x.astype("i4"), weight, epsilon=EPSILON)
    reciprocal = reference.reciprocal_rms(x, EPSILON)
    with pytest.raises(ValueError, match=r"reciprocal must have shape \(8,\)"):
        pk.rms_norm_gradient(x, weight, reciprocal[:4], gradient)
    with pytest.raises(ValueError, match=r"gradient must have shape \(8, 256\)"):
        pk.rms_norm_gradient(x, weight, reciprocal, gradient[:4])
    with pytest.raises(ValueError, match=r"plus must have shape \(8, 256\)"):
        pk.rms_norm_gradient(x, weight, reciprocal, gradient, plus=gradient[:4])
    with pytest.raises(TypeError, match="carry no gradient"):
        jax.grad(lambda x: pk.quantize_rms_norm(x, weight, epsilon=EPSILON)[0].scales.sum())(x.astype("f4"))
