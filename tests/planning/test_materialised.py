"""Which values of a forward pass a backward pass reads from memory: small functions, counted by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import Array

from dsv3_jax.planning.materialised import materialised_bytes

TOKENS, WIDTH = 64, 32
ARRAY = TOKENS * WIDTH * 2  # bytes of one bfloat16 array of hidden states


def linear(weight: Array, x: Array) -> Array:
    """The result is not read; its input is."""
    return x @ weight.astype(x.dtype)


def activated(weight: Array, x: Array) -> Array:
    """Read: x, the product that silu is computed from, and what the second product multiplies."""
    return jax.nn.silu(x @ weight.astype(x.dtype)) @ weight.astype(x.dtype)


def normed(weight: Array, x: Array) -> Array:
    """Read: x, from which all of the norm is computed again, and the product's operand."""
    wide = x.astype(jnp.float32)
    scaled = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + 1e-6)
    return scaled.astype(x.dtype) @ weight.astype(x.dtype)


def reshaped(weight: Array, x: Array) -> Array:
    """One array under two shapes is one array."""
    x = x.reshape(TOKENS // 2, 2, WIDTH)
    return jnp.sin(x) + (x @ weight.astype(x.dtype))


def of_parameters(weight: Array, x: Array) -> Array:
    """What depends on parameters alone is not counted: only x is read."""
    return x @ jnp.tanh(weight @ weight).astype(x.dtype)


@pytest.mark.parametrize(
    ("function", "arrays"), [(linear, 1), (activated, 3), (normed, 2), (reshaped, 1), (of_parameters, 1)]
)
@pytest.mark.parametrize("called", [False, True])
def test_bytes_that_are_read(function: Callable[..., Any], arrays: int, called: bool) -> None:
    """A function under jit counts as if it were written out."""
    inner = jax.jit(function) if called else function
    weight = jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)
    x = jax.ShapeDtypeStruct((TOKENS, WIDTH), jnp.bfloat16)
    found = materialised_bytes(lambda first: inner(*first), weight, x)
    assert found == arrays * ARRAY
