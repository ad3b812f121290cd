"""Checks products with weights in tiles: their values, and that a row's bits do not depend on the other rows."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.precision.tiled_weight import AbsorbedWeight, TiledWeight

SHAPES = [((12,), (8,)), ((2, 64), (32,)), ((80,), (4, 16)), ((5, 30), (512,)), ((64,), (600,)), ((130,), (1100,))]
multiply = jax.jit(lambda weight, x: weight.product(x, jnp.float32))


def factors(out: tuple[int, ...], inputs: tuple[int, ...], rows: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    return (random.standard_normal(shape).astype(np.float32) for shape in ((*out, *inputs), (rows, np.prod(inputs))))


@pytest.mark.parametrize(("out", "inputs"), SHAPES)
def test_a_row_gets_the_right_product_and_the_same_bits_in_every_batch(out, inputs) -> None:
    w, x = factors(out, inputs, 70)
    weight = TiledWeight.of(jnp.asarray(w), len(inputs))
    assert weight.shape == w.shape
    together = np.asarray(multiply(weight, x))
    wide = x.astype(np.float64) @ w.reshape(-1, x.shape[1]).T.astype(np.float64)
    np.testing.assert_allclose(together, wide, atol=2e-6 * x.shape[1])
    for start, rows in ((0, 1), (69, 1), (3, 2), (5, 17), (6, 64)):
        alone = np.asarray(multiply(weight, x[start : start + rows]))
        np.testing.assert_array_equal(alone, together[start : start + rows])


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(2, 5), st.integers(1, 9))
def test_stacks_are_selected_and_reshaped_as_arrays_are(layers: int, experts: int, width: int, inputs: int) -> None:
    w = np.random.default_rng(0).standard_normal((layers, experts, 2, width, inputs)).astype(np.float32)
    x = np.random.default_rng(1).standard_normal((3, inputs)).astype(np.float32)
    flat = TiledWeight.of(jnp.asarray(w), 1, 2).reshape(-1, 2 * width, inputs)
    assert flat.shape == (layers * experts, 2 * width, inputs)
    want = x.astype(np.float64) @ w.reshape(*flat.shape)[-1].T.astype(np.float64)
    np.testing.assert_allclose(
        np.asarray(flat[layers * experts - 1].product(jnp.asarray(x), jnp.float32)), want, atol=1e-5
    )


def test_weights_of_experts_that_are_not_chosen_are_not_copied() -> None:
    """Not even inside loops over layers and over rows, whose operands XLA copies where their layouts differ."""
    weight = TiledWeight.of(jnp.ones((3, 8, 96, 40)), stack_axes=2)

    def layers(weight: TiledWeight, u: jax.Array, chosen: jax.Array) -> jax.Array:
        of_all = weight.reshape(-1, 96, 40)

        def layer(u: jax.Array, layer: jax.Array) -> tuple[jax.Array, None]:
            def expert(i: jax.Array, u: jax.Array) -> jax.Array:
                return u + of_all[8 * layer + chosen[i]].product(u, jnp.float32)[:, :40]

            return jax.lax.fori_loop(0, jnp.sum(chosen > 0), expert, u), None

        return jax.lax.scan(layer, u, jnp.arange(3))[0]

    program = jax.jit(layers).lower(weight, jnp.ones((1, 40)), jnp.arange(4)).compile().as_text()
    made = re.findall(r"= f32\[([\d,]+)\]\S* (?:copy|transpose|fusion)\(", program)
    assert made
    sizes = [np.prod([int(size) for size in shape.split(",")]) for shape in made]
    assert max(sizes) < weight.values.size


def test_absorbed_up_projections_of_keys_and_values_are_apart() -> None:
    heads, keys, values, rank = 3, 8, 5, 20
    random = np.random.default_rng(0)
    w = random.standard_normal((heads, keys + values, rank)).astype(np.float32)
    query, gathered = (random.standard_normal((heads, 4, width)).astype(np.float32) for width in (keys, rank))
    weight = AbsorbedWeight.of(jnp.asarray(w), keys)
    for tiles, x, matrix in (
        (weight.key, query, w[:, :keys].swapaxes(1, 2)),
        (weight.value, gathered, w[:, keys:]),
    ):
        wanted = np.einsum("hoi,hri->hro", matrix.astype(np.float64), x.astype(np.float64))
        together = np.asarray(multiply(tiles, x))
        np.testing.assert_allclose(together, wanted, atol=1e-5)
        np.testing.assert_array_equal(np.asarray(multiply(tiles, x[:, :1])), together[:, :1])
