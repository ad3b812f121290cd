"""Checks that three bfloat16 products have float32's accuracy, values and gradients, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.precision.split_product import parts, split_product

EPSILON = 2.0**-24  # half a unit in the last place of float32


@pytest.fixture
def operands():
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, 60, 512)).astype(jnp.bfloat16)
    weight = jax.random.normal(keys[1], (48, 512)) * jnp.exp(jax.random.normal(keys[2], (48, 1)) * 3)
    return x, weight


def test_parts_add_up(operands):
    weight = np.asarray(operands[1], "f8")
    high, middle, low = (np.asarray(part, "f8") for part in parts(operands[1]))
    np.testing.assert_array_equal(high + middle + low, weight)


def test_logits_have_float32_accuracy(operands):
    x, weight = operands
    wide, exact = np.asarray(x, "f8"), np.asarray(weight, "f8")
    error = np.abs(np.asarray(jax.jit(split_product)(x, weight), "f8") - wide @ exact.T)
    # Sums of 512 terms in float32 err by a few roundings of the sum of magnitudes.
    scale = np.abs(wide) @ np.abs(exact).T
    assert np.max(error / scale) < 4 * EPSILON
    rounded = np.abs(np.asarray(x @ weight.T.astype(jnp.bfloat16), "f8") - wide @ exact.T)
    assert np.max(rounded / scale) > 1000 * EPSILON  # a bfloat16 product would not do


def test_gradients_have_the_accuracy_of_their_dtypes(operands):
    x, weight = operands
    out_bar = jax.random.normal(jax.random.key(5), (2, 60, 48))
    x_bar, weight_bar = jax.vjp(split_product, x, weight)[1](out_bar)
    assert (x_bar.dtype, weight_bar.dtype) == (jnp.bfloat16, jnp.float32)
    bar, wide, exact = (np.asarray(v, "f8") for v in (out_bar, x, weight))
    # Half a unit of bfloat16, and the products of parts that are left out.
    allowed = 2**-8 * np.abs(bar @ exact) + 2**-14 * (np.abs(bar) @ np.abs(exact))
    assert np.all(np.abs(np.asarray(x_bar, "f8") - bar @ exact) <= allowed)
    wanted = np.einsum("bte,btd->ed", bar, wide)
    scale = np.einsum("bte,btd->ed", np.abs(bar), np.abs(wide))
    assert np.max(np.abs(np.asarray(weight_bar, "f8") - wanted) / scale) < 4 * EPSILON
