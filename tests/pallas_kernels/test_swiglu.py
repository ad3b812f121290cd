"""Checks SwiGLU with its quantization against float64, autodiff and the two operations one after the other."""

import jax
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest
from interpreted import interpreted_hopper

import pallas_kernels as pk
from pallas_kernels.swiglu import hopper, reference, tpu

WIDTH = 128


def operands(rows, dtype=jnp.bfloat16, width=WIDTH):
    """Returns gates and factors, some large and some zero, and the gradient of the activation."""
    rng = np.random.default_rng(0)
    gate_up = rng.normal(size=(rows, 2 * width)) * np.exp2(rng.integers(-6, 6, size=(rows, 1)))
    gate_up[3], gate_up[5, :width] = 0, -200
    return jnp.asarray(gate_up, dtype), jnp.asarray(rng.normal(size=(rows, width)), dtype)


def float64_swiglu(gate_up):
    gate, up = np.split(np.asarray(gate_up, "f8"), 2, axis=1)
    return gate / (1 + np.exp(-gate)) * up


def assert_same_bits(got: pk.Quantized, wanted: pk.Quantized):
    assert got.tile == wanted.tile
    np.testing.assert_array_equal(got.scales, wanted.scales)
    np.testing.assert_array_equal(np.asarray(got.values, "f4"), np.asarray(wanted.values, "f4"))


@pytest.mark.parametrize("power_of_two", [False, True])
def test_the_definition_is_the_activation_and_then_quantization(power_of_two):
    """Against float64 rounded to bfloat16, then quantised: equal but where float32 rounds to the other neighbour."""
    gate_up, _ = operands(200)
    hidden, kept = pk.quantize_swiglu(gate_up, power_of_two_scales=power_of_two)
    assert_same_bits(kept, pk.quantize(gate_up, tile="1x128"))
    activated = jnp.asarray(float64_swiglu(gate_up), jnp.bfloat16)
    wanted = pk.quantize(activated, tile="1x128", power_of_two_scales=power_of_two)
    np.testing.assert_allclose(hidden.scales, wanted.scales, rtol=2**-8)
    assert np.mean(np.asarray(hidden.values, "f4") != np.asarray(wanted.values, "f4")) < 1e-3


def test_gradient_equals_autodiff():
    gate_up, gradient = operands(200, jnp.float32)
    _, kept = pk.quantize_swiglu(gate_up)
    bar, columns = pk.swiglu_gradient(kept, gradient)

    def swiglu(x):
        gate, up = jnp.split(x, 2, axis=1)
        return jax.nn.silu(gate) * up

    restored = pk.dequantize(kept)
    hidden, pull = jax.vjp(swiglu, restored)
    np.testing.assert_allclose(bar, pull(gradient)[0], rtol=1e-4, atol=1e-5 * np.abs(pull(gradient)[0]).max())
    wanted = pk.quantize(hidden, tile="128x1").mT
    np.testing.assert_allclose(columns.scales, wanted.scales, rtol=1e-6)
    assert np.mean(np.asarray(columns.values, "f4") != np.asarray(wanted.values, "f4")) < 1e-3


@pytest.mark.parametrize("device", ["hopper", "tpu"])
@pytest.mark.parametrize(
    ("rows", "width", "dtype", "power_of_two"), [(256, 256, "bfloat16", False), (140, 128, "float32", True)]
)
def test_kernels_equal_the_definition(device, rows, width, dtype, power_of_two):
    """Activations may differ by a rounding of the exponential; what is kept of the input has the same bits."""
    gate_up, gradient = operands(rows, jnp.dtype(dtype), width)

    def run(function, *arguments):
        if device == "tpu":
            return function(*arguments, power_of_two, interpret=pltpu.InterpretParams())
        with interpreted_hopper(num_cores=1) as interpret:
            return jax.block_until_ready(function(*arguments, power_of_two, interpret=interpret))

    kernel = hopper if device == "hopper" else tpu
    hidden, kept = run(kernel.quantize_swiglu, gate_up)
    wanted_hidden, wanted_kept = reference.quantize_swiglu(gate_up, power_of_two)
    assert_same_bits(kept, wanted_kept)
    assert_nearly_same(hidden, wanted_hidden)
    bar, columns = run(kernel.swiglu_gradient, kept, gradient)
    wanted_bar, wanted_columns = reference.swiglu_gradient(wanted_kept, gradient, power_of_two)
    assert bar.dtype == gradient.dtype
    tolerance = 2**-7 if dtype == "bfloat16" else 1e-5
    np.testing.assert_allclose(np.asarray(bar, "f4"), np.asarray(wanted_bar, "f4"), rtol=tolerance, atol=1e-6)
    assert_nearly_same(columns, wanted_columns)


def assert_nearly_same(got: pk.Quantized, wanted: pk.Quantized):
    assert (got.tile, got.shape) == (wanted.tile, wanted.shape)
    np.testing.assert_allclose(got.scales, wanted.scales, rtol=2**-7)
    differing = np.asarray(got.values, "f4") != np.asarray(wanted.values, "f4")
    assert np.mean(differing) < 1e-2
    np.testing.assert_allclose(
        pk.dequantize(got), pk.dequantize(wanted), rtol=2**-2, atol=np.abs(wanted.scales).max() * 2**-8
    )


def test_bad_input_is_named():
    gate_up, gradient = operands(8)
    _, kept = pk.quantize_swiglu(gate_up)
    with pytest.raises(ValueError, match=r"gate_up must be \[M, 2 W\] with W a multiple of 128, not \(8, 128\)"):
        pk.quantize_swiglu(gate_up[:, :128])
    with pytest.raises(TypeError, match="gate_up must be float32 or bfloat16, not int32"):
        pk.quantize_swiglu(gate_up.astype("i4"))
    with pytest.raises(ValueError, match=r"gradient must have shape \(8, 128\)"):
        pk.swiglu_gradient(kept, gradient[:4])
    with pytest.raises(ValueError, match="gate_up must be in 1x128 tiles"):
        pk.swiglu_gradient(kept.mT, gradient)
    with pytest.raises(TypeError, match="carry no gradient"):
        jax.grad(lambda x: pk.quantize_swiglu(x)[0].scales.sum())(gate_up.astype("f4"))
