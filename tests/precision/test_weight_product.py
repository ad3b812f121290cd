"""Checks the product with a weight and its gradients against float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.precision.weight_product import weight_product

EPSILON = {"float32": 2.0**-23, "bfloat16": 2.0**-8}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@given(
    groups=st.sampled_from([(), (3,)]), rows=st.integers(1, 40), inputs=st.integers(1, 24), outputs=st.integers(1, 24)
)
@settings(max_examples=8, deadline=None)
def test_product_and_gradients(dtype: str, groups: tuple[int, ...], rows: int, inputs: int, outputs: int):
    random = np.random.default_rng(rows * 576 + inputs * 24 + outputs)
    x = jnp.asarray(random.normal(size=(*groups, rows, inputs)), dtype)
    weight = jnp.asarray(random.normal(size=(*groups, outputs, inputs)), jnp.float32)
    bar = jnp.asarray(random.normal(size=(*groups, rows, outputs)), jnp.float32)
    y, pull = jax.vjp(lambda x, w: weight_product(x, w, jnp.dtype(dtype), jnp.dtype(jnp.float32)), x, weight)
    x_bar, weight_bar = pull(bar)
    assert (y.dtype, x_bar.dtype, weight_bar.dtype) == (jnp.float32, x.dtype, jnp.float32)

    x64, weight64, bar64 = (np.asarray(array.astype(dtype), np.float64) for array in (x, weight, bar))
    for got, left, right in (
        (y, x64, weight64.swapaxes(-1, -2)),
        (x_bar, bar64, weight64),
        (weight_bar, bar64.swapaxes(-1, -2), x64),
    ):
        bound = np.abs(left) @ np.abs(right) * left.shape[-1] * EPSILON["float32"] + 1e-30
        error = np.abs(np.asarray(got, np.float64) - left @ right)
        rounding = np.abs(left @ right) * (EPSILON[dtype] if got is x_bar else 0.0)
        assert np.all(error <= bound + rounding)


def test_gradients_of_each_row():
    """Gradients per example, as `jax.vmap` of a gradient gives them, are the gradients of one example each."""
    random = np.random.default_rng(0)
    weight, rows = (jnp.asarray(random.normal(size=shape), jnp.float32) for shape in ((5, 7), (4, 3, 7)))

    def loss(weight: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(weight_product(x, weight, jnp.dtype("float32"), jnp.dtype("float32")) ** 2)

    together = jax.vmap(jax.grad(loss), in_axes=(None, 0))(weight, rows)
    for x, got in zip(rows, together, strict=True):
        np.testing.assert_allclose(got, jax.grad(loss)(weight, x), rtol=1e-5, atol=1e-5)
