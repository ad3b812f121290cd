"""Checks FP8 weights as published against the numbers they represent, computed here in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv3_jax.precision import Precision, grouped_linear, grouped_swiglu_linear, linear, swiglu_linear
from dsv3_jax.precision.fp8_weight import Fp8Weight

BLOCK = 128


def stored(stack: tuple[int, ...], out: tuple[int, ...], inputs: tuple[int, ...], seed: int = 0) -> Fp8Weight:
    """Returns random values and scales; no quantization of the weights would choose these scales."""
    random = np.random.default_rng(seed)
    rows, columns = int(np.prod(out)), int(np.prod(inputs))
    values = random.normal(size=(*stack, *out, *inputs)).astype(ml_dtypes.float8_e4m3fn)
    blocks = (*stack, -(-rows // BLOCK), -(-columns // BLOCK))
    return Fp8Weight(jnp.asarray(values), jnp.asarray(random.uniform(0.01, 0.1, blocks), jnp.float32), columns)


def numbers(weight: Fp8Weight) -> np.ndarray:
    """Returns values * scales, matrix by matrix, in the parameter's shape."""
    stack = weight.scales.shape[:-2]
    values = np.asarray(weight.values, np.float64).reshape(-1, weight.size // int(np.prod(stack)))
    scales = np.asarray(weight.scales, np.float64).reshape(len(values), *weight.scales.shape[-2:])
    matrices = []
    for matrix, scale in zip(values, scales, strict=True):
        matrix = matrix.reshape(-1, weight.columns)
        wide = np.kron(scale, np.ones((BLOCK, BLOCK)))[: matrix.shape[0], : matrix.shape[1]]
        matrices.append(matrix * wide)
    return np.reshape(matrices, weight.values.shape)


def rounded(x: np.ndarray) -> np.ndarray:
    """Returns x [M, K] rounded to e4m3 in tiles of 1x128."""
    out = np.empty(x.shape)
    for start in range(0, x.shape[1], BLOCK):
        part = x[:, start : start + BLOCK].astype(np.float32)
        scales = np.abs(part).max(1, keepdims=True) / np.float32(448)
        values = np.clip(part * (1 / scales), -448, 448).astype(ml_dtypes.float8_e4m3fn)
        out[:, start : start + BLOCK] = values.astype(np.float64) * scales
    return out


def assert_close(ours: jax.Array, theirs: np.ndarray) -> None:
    """Checks equality to float32 rounding of sums; one operand between two FP8 numbers may be rounded either way."""
    assert ours.shape == theirs.shape
    error = np.linalg.norm(np.asarray(ours, np.float64) - theirs, axis=0) / np.linalg.norm(theirs, axis=0)
    assert np.median(error) < 1e-5
    assert error.max() < 2e-3


def test_indexing_and_reshape_select_the_same_numbers() -> None:
    """Indices select layers and experts of a pair of matrices of odd sizes, also inside a loop over layers."""
    weight = stored((2, 3, 2), (150,), (140,))
    plain = numbers(weight).astype(np.float32)
    np.testing.assert_array_equal(weight[...].astype(jnp.float32), plain)
    np.testing.assert_array_equal(jax.jit(lambda w, i: w[i].astype(jnp.float32))(weight, 1), plain[1])
    experts = jnp.asarray([4, 0, 4])
    chosen = weight.reshape(6, 300, 140)[experts]
    assert chosen.shape == (3, 300, 140)
    np.testing.assert_array_equal(chosen.astype(jnp.float32), plain.reshape(6, 300, 140)[np.asarray(experts)])
    _, layers = jax.lax.scan(lambda _, w: (None, w.reshape(3, -1, 140).astype(jnp.float32)), None, weight)
    np.testing.assert_array_equal(layers, plain.reshape(2, 3, 300, 140))
    stacked = jax.vmap(lambda w: w.reshape(-1, 140).astype(jnp.float32))(weight)
    np.testing.assert_array_equal(stacked, plain.reshape(2, 900, 140))
    for wrong in (slice(1), (0, 1)):
        with pytest.raises(TypeError, match="whole or by indices"):
            weight[wrong]
    with pytest.raises(TypeError, match="whole or by indices"):
        stored((), (150,), (140,))[0]


@pytest.mark.parametrize(
    ("out", "inputs", "after_attention"), [((3, 50), (260,), False), ((150,), (3, 90), True), ((256,), (256,), False)]
)
def test_fp8_product_multiplies_by_what_is_stored(
    out: tuple[int, ...], inputs: tuple[int, ...], after_attention: bool
) -> None:
    """In the forward product and the input gradient no weight is rounded again, and none has a gradient."""
    weight = stored((), out, inputs)
    w = numbers(weight).reshape(-1, weight.columns)
    random = np.random.default_rng(1)
    x, bar = (random.normal(size=(130, width)).astype(np.float32) for width in (w.shape[1], w.shape[0]))
    precision = Precision.preset("fp8,compute_dtype=float32,after_attention=e4m3")

    def product(x: jax.Array, weight: Fp8Weight) -> jax.Array:
        return linear(x, weight.reshape(-1, weight.columns), precision, after_attention=after_attention)

    y, pull = jax.vjp(product, jnp.asarray(x), weight)
    x_bar, weight_bar = pull(jnp.asarray(bar))
    assert_close(y, rounded(x) @ w.T)
    assert_close(x_bar, rounded(bar) @ w)
    assert not np.asarray(weight_bar.values, np.float32).any()
    assert not np.asarray(weight_bar.scales).any()


@pytest.mark.parametrize("fields", ["tile=32", "promotion=false", "forward=none", "input_gradient=none", "tile=0"])
def test_other_recipes_use_the_stored_blocks_too(fields: str) -> None:
    """Each is within the rounding of its own input format; a weight rounded again would be off by 3%."""
    weight = stored((), (150,), (260,))
    w = numbers(weight)
    random = np.random.default_rng(2)
    # Every format holds these inputs exactly, so that only the weight could be rounded.
    x, bar = (random.choice([-1.0, 0.0, 1.0], size=(130, width)).astype(np.float32) for width in (260, 150))
    precision = Precision.preset(f"fp8,compute_dtype=float32,{fields}")
    y, pull = jax.vjp(lambda x: linear(x, weight, precision), jnp.asarray(x))
    (x_bar,) = pull(jnp.asarray(bar))
    for ours, theirs in ((y, x @ w.T), (x_bar, bar @ w)):
        assert np.linalg.norm(np.asarray(ours, "f8") - theirs) / np.linalg.norm(theirs) < 5e-3


def test_experts_whose_gate_and_up_are_separate_ragged_matrices() -> None:
    """Gate and up have scales of their own; the tiles of a gradient do not cross from one to the other."""
    gate_up, down = stored((2, 2), (150,), (140,)), stored((2,), (140,), (150,), seed=3)
    sizes, width = [128, 256], 150
    random = np.random.default_rng(4)
    rows = random.normal(size=(384, 140)).astype(np.float32)
    apply = {"group_sizes": jnp.asarray(sizes), "row_alignment": 128}
    plain = Precision.preset("fp8,compute_dtype=float32,dispatch=false")

    def first(rows: jax.Array) -> jax.Array:
        return grouped_linear(rows, gate_up.reshape(2, 300, 140), precision=plain, **apply)

    hidden, pull = jax.vjp(first, jnp.asarray(rows))
    bar = random.normal(size=hidden.shape).astype(np.float32)
    x8, pieces = rounded(rows), np.split(np.arange(384), np.cumsum(sizes)[:-1])
    w = numbers(gate_up)
    wanted = np.concatenate([x8[at] @ w[e].reshape(300, 140).T for e, at in enumerate(pieces)])
    assert_close(hidden, wanted)
    halves = [rounded(half) for half in np.split(bar, 2, axis=1)]
    wanted = np.concatenate([halves[0][at] @ w[e, 0] + halves[1][at] @ w[e, 1] for e, at in enumerate(pieces)])
    assert_close(pull(jnp.asarray(bar))[0], wanted)

    out, pull = jax.vjp(lambda h: grouped_swiglu_linear(h, down, precision=plain, **apply), hidden)
    gate, up = np.split(np.asarray(hidden, np.float64), 2, axis=1)
    activated = rounded((gate / (1 + np.exp(-gate)) * up).astype(np.float32))
    w = numbers(down)
    wanted = np.concatenate([activated[at] @ w[e].T for e, at in enumerate(pieces)])
    # SwiGLU in float32 moves a few activations to the neighbouring FP8 number.
    assert np.linalg.norm(np.asarray(out, np.float64) - wanted) / np.linalg.norm(wanted) < 2e-3
    assert pull(out)[0].shape == (384, 2 * width)
    one = swiglu_linear(hidden.reshape(-1, 2, width)[:128], down[0], plain)
    np.testing.assert_allclose(one, out[:128], rtol=1e-4, atol=1e-4)
