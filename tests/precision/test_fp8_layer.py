"""Checks an FP8 linear map's three products and every field of the recipe against float64 on rounded operands."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv3_jax.errors import ConfigError
from dsv3_jax.precision import Precision, saved_bytes
from dsv3_jax.precision.e5m6 import pack, unpack
from dsv3_jax.precision.fp8_layer import fp8_product
from dsv3_jax.precision.fp8_recipe import Fp8Recipe, Role

ROWS, WIDTH, OUT = 256, 192, 160
FORMATS = {"e4m3": (ml_dtypes.float8_e4m3fn, 448.0), "e5m2": (ml_dtypes.float8_e5m2, 57344.0)}
LINEAR, BEHIND_ATTENTION, BEHIND_SWIGLU = Role(), Role(after_attention=True), Role(swiglu=True)
SENT, SENT_BACK = Role(dispatched=True), Role(gradient_dispatched=True)


def rounded(
    x: np.ndarray, tile: tuple[int, int], number_format: str = "e4m3", power_of_two: bool = False
) -> np.ndarray:
    """Returns `x` rounded to FP8, tile by tile."""
    dtype, largest = FORMATS[number_format]
    out = np.empty_like(x, dtype=np.float64)
    rows, columns = (size or full for size, full in zip(tile, x.shape, strict=True))
    for i in range(0, x.shape[0], rows):
        for j in range(0, x.shape[1], columns):
            part = x[i : i + rows, j : j + columns].astype(np.float32)
            scale = np.abs(part).max() / np.float32(largest)
            if power_of_two:
                scale = np.float32(2.0 ** np.ceil(np.log2(np.float64(scale))))
            values = np.clip(part * (np.float32(1) / scale), -largest, largest).astype(dtype)
            out[i : i + rows, j : j + columns] = values.astype(np.float64) * np.float64(scale)
    return out


@functools.cache
def operands() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns x, W and the gradient of the output, with rows and columns of very different size."""
    random = np.random.default_rng(0)
    x, w, g = (random.normal(size=shape) for shape in ((ROWS, WIDTH), (OUT, WIDTH), (ROWS, OUT)))
    x *= np.exp2(random.integers(-6, 7, size=(ROWS, 1)))
    g *= np.exp2(random.integers(-6, 7, size=(1, OUT)))
    return tuple(np.asarray(array, np.float32) for array in (x, w, g))


def run(x, w, g, sizes, recipe: Fp8Recipe, role: Role) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns y, dx and dW, computed operation by operation, since most operations are compiled for other cases too."""
    with jax.disable_jit():
        y, pull = jax.vjp(lambda x, w: fp8_product(x, w, sizes, recipe, role), jnp.asarray(x), jnp.asarray(w))
        return y, *pull(jnp.asarray(g))


@functools.cache
def products(recipe: Fp8Recipe, role: Role, by: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns y, dx and dW of one matrix under the recipe, the gradient of the output being multiplied by `by`."""
    x, w, g = operands()
    return tuple(np.asarray(array, np.float64) for array in run(x, w, g * np.float32(by), None, recipe, role))


def expected(recipe: Fp8Recipe, role: Role) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns y, dx and dW in float64, from the definition (report figure 6, sections 3.3.2 and 3.3.3)."""
    x, w, g = operands()
    row, column, square = (
        ((1, recipe.tile), (recipe.tile, 1), (recipe.tile, recipe.tile)) if recipe.tile else [(0, 0)] * 3
    )
    always = recipe.power_of_two_scales
    behind = role.after_attention and recipe.after_attention == "e5m6"
    input_powers = always or behind or (role.dispatched and recipe.dispatch)
    w8 = rounded(w, square)
    x8 = rounded(x, row, power_of_two=input_powers)
    y = x @ w.T.astype(np.float64) if recipe.forward == "none" else x8 @ w8.T
    if recipe.input_gradient == "none":
        dx = g @ w.astype(np.float64)
    else:
        tile = square if recipe.block_wise_gradients else row
        powers = always or (role.gradient_dispatched and recipe.dispatch)
        dx = rounded(g, tile, recipe.input_gradient, powers) @ w8
    kept = x8
    if behind:
        kept = np.asarray(unpack(pack(jnp.asarray(x))), np.float64)
    elif (role.after_attention and recipe.after_attention == "none") or not recipe.cache_activations:
        kept = x
    if recipe.weight_gradient == "none":
        dw = g.T.astype(np.float64) @ kept
    else:
        left = rounded(g, column, recipe.weight_gradient, always)
        dw = left.T @ rounded(kept, column, power_of_two=input_powers)
    return y, dx, dw


def assert_close(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Checks equality to float32 rounding of sums; an operand between two FP8 numbers may be rounded either way."""
    assert ours.shape == theirs.shape
    # One such operand moves a sum by 2^-4 of one of its few hundred terms.
    error = np.linalg.norm(ours - theirs, axis=0) / np.linalg.norm(theirs, axis=0)
    assert error.max() < 1e-3
    assert np.median(error) < 1e-5


FIELDS = {
    "the report's": Fp8Recipe(),
    "forward": Fp8Recipe(forward="none"),
    "input gradient": Fp8Recipe(input_gradient="none"),
    "weight gradient": Fp8Recipe(weight_gradient="none"),
    "gradients in e5m2": Fp8Recipe(input_gradient="e5m2", weight_gradient="e5m2"),
    "tiles of 32": Fp8Recipe(tile=32),
    "one scale": Fp8Recipe(tile=0),
    "gradients in blocks": Fp8Recipe(block_wise_gradients=True),
    "powers of two": Fp8Recipe(power_of_two_scales=True),
    "nothing cached": Fp8Recipe(cache_activations=False),
}


@pytest.mark.parametrize("name", FIELDS)
def test_products_of_a_linear_map(name):
    for ours, theirs in zip(products(FIELDS[name], LINEAR), expected(FIELDS[name], LINEAR), strict=True):
        assert_close(ours, theirs)


ROLES = {
    "attention e5m6": (Fp8Recipe(), BEHIND_ATTENTION),
    "attention e4m3": (Fp8Recipe(after_attention="e4m3"), BEHIND_ATTENTION),
    "attention none": (Fp8Recipe(after_attention="none"), BEHIND_ATTENTION),
    "sent": (Fp8Recipe(), SENT),
    "sent as it is": (Fp8Recipe(dispatch=False), SENT),
    "gradient sent": (Fp8Recipe(), SENT_BACK),
}


@pytest.mark.parametrize("name", ROLES)
def test_layers_with_a_rule_of_their_own(name):
    for ours, theirs in zip(products(*ROLES[name]), expected(*ROLES[name]), strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("name", [*FIELDS, *ROLES, "no promotion"])
def test_gradients_times_tokens_do_not_depend_on_the_tokens(name):
    """The loss is divided by the batch's tokens, 2^8 to 2^26; a token's own gradients are small too, here 2^-20.

    Powers of two change no rounding, so that the gradients are equal bit for bit.
    """
    recipe, role = ROLES.get(name) or (FIELDS.get(name, Fp8Recipe(promotion=False)), LINEAR)
    y, dx, dw = products(recipe, role)
    for tokens in (2.0**8, 2.0**26):
        by = 2.0**-20 / tokens
        same, dx_scaled, dw_scaled = products(recipe, role, by)
        np.testing.assert_array_equal(same, y)
        np.testing.assert_array_equal(dx_scaled / by, dx)
        np.testing.assert_array_equal(dw_scaled / by, dw)


@pytest.mark.parametrize("name", [name for name in FIELDS if name != "the report's"])
def test_every_field_changes_something(name):
    """What a map computes differs from what it computes under the report's recipe."""
    pairs = zip(products(Fp8Recipe(), LINEAR), products(FIELDS[name], LINEAR), strict=True)
    assert any(np.linalg.norm(a - b) > 1e-4 * np.linalg.norm(a) for a, b in pairs)


@pytest.mark.parametrize(("cached", "width"), [(True, WIDTH), (False, WIDTH), (True, 128)])
def test_swiglu_is_recomputed_from_what_is_kept(cached, width):
    """Where the width is a multiple of 128, SwiGLU and quantization are one operation."""
    recipe = Fp8Recipe(cache_swiglu_input=cached)
    w, g = operands()[1][:, :width], operands()[2]
    x = np.random.default_rng(1).normal(size=(ROWS, 2 * width)).astype(np.float32)

    def swiglu(x):
        gate, up = np.split(x, 2, axis=1)
        return gate / (1 + np.exp(-gate)) * up

    y, dx, dw = run(x, w, g, None, recipe, BEHIND_SWIGLU)
    x64 = x.astype(np.float64)
    assert_close(np.asarray(y, np.float64), rounded(swiglu(x64), (1, 128)) @ rounded(w, (128, 128)).T)
    kept = rounded(x, (1, 128)) if cached else x64
    activated = rounded(swiglu(kept), (128, 1))
    assert_close(np.asarray(dw, np.float64), rounded(g, (128, 1)).T @ activated)
    inner = rounded(g, (1, 128)) @ rounded(w, (128, 128))
    gate, up = np.split(kept, 2, axis=1)
    sigmoid = 1 / (1 + np.exp(-gate))
    slopes = np.concatenate([up * sigmoid * (1 + gate * (1 - sigmoid)), gate * sigmoid], axis=1)
    assert_close(np.asarray(dx, np.float64), np.concatenate([inner, inner], axis=1) * slopes)


@pytest.mark.parametrize("promotion", [True, False])
def test_experts_are_as_alone(promotion):
    """Each expert's rows give what they give with its matrix alone; an expert without rows has a gradient of zero."""
    recipe, sizes = Fp8Recipe(promotion=promotion), [128, 0, 128]
    random = np.random.default_rng(2)
    x, g = (jnp.asarray(random.normal(size=(384, width)), jnp.float32) for width in (128, 64))
    w = jnp.asarray(random.normal(size=(3, 64, 128)), jnp.float32)
    y, dx, dw = run(x, w, g, jnp.asarray(sizes), recipe, SENT)
    start = 0
    for expert, size in enumerate(sizes):
        rows = slice(start, start + size)
        start += size
        if not size:
            assert not np.any(dw[expert])
            continue
        alone = run(x[rows], w[expert], g[rows], None, recipe, SENT)
        for ours, theirs in zip((y[rows], dx[rows], dw[expert]), alone, strict=True):
            # The sums are in another order, in float32 or in the 14 bits of the short accumulator.
            np.testing.assert_allclose(ours, theirs, atol=(1e-6 if promotion else 2.0**-12) * np.max(np.abs(theirs)))
    assert not np.any(y[start:])


def test_a_short_accumulator_loses_what_promotion_keeps():
    """Takes long sums of numbers of one sign, the worst case of section 3.3.2."""
    random = np.random.default_rng(3)
    x, w = (jnp.asarray(random.uniform(0.5, 1, size=(8, 4096)), jnp.float32) for _ in range(2))
    exact = rounded(np.asarray(x), (1, 128)) @ rounded(np.asarray(w), (128, 128)).T

    def error(promotion):
        y = fp8_product(x, w, None, Fp8Recipe(promotion=promotion), LINEAR)
        return np.max(np.abs(np.asarray(y, np.float64) - exact) / exact)

    assert error(True) < (128 + 32) * 2.0**-24  # as many float32 additions follow one another
    assert 1e-3 < error(False) < 0.05


def test_kept_bytes_fall():
    """One map keeps inputs in 2 bytes per number as bfloat16, 1 and a scale per tile as FP8, and 1.5 as e5m6."""
    x = jax.ShapeDtypeStruct((ROWS, 256), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((128, 256), jnp.float32)

    def kept(recipe, role):
        # Differentiated in x only, so that nothing kept of W is counted.
        return saved_bytes(lambda x, w: fp8_product(jnp.tanh(x), w, None, recipe, role), x, w)

    tiles = kept(Fp8Recipe(), LINEAR)["float8_e4m3fn"] - 128 * 256
    assert tiles == ROWS * 256
    assert kept(Fp8Recipe(), BEHIND_ATTENTION)["uint8"] == ROWS * 256 * 3 // 2
    whole = kept(Fp8Recipe(cache_activations=False), LINEAR)
    assert whole["bfloat16"] - kept(Fp8Recipe(), LINEAR)["bfloat16"] == ROWS * 256 * 2
    assert whole["float8_e4m3fn"] == 128 * 256


def test_e5m6_is_the_nearest_of_its_numbers():
    """Compares with all 2^11 finite numbers of the format; ties go to the even one."""
    exponents, mantissas = np.meshgrid(np.arange(31), np.arange(64), indexing="ij")
    numbers = np.where(exponents == 0, mantissas / 64 * 2.0**-14, (1 + mantissas / 64) * 2.0 ** (exponents - 15.0))
    numbers = np.unique(numbers)
    even = (
        np.round(numbers / np.maximum(2.0 ** (np.floor(np.log2(np.maximum(numbers, 2.0**-14))) - 6), 2.0**-20)) % 2 == 0
    )
    random = np.random.default_rng(4)
    x = np.exp2(random.uniform(-22, 15.9, size=(64, 127))) * random.choice([-1, 1], size=(64, 127))
    halfway = (numbers[:-1] + numbers[1:]) / 2
    x[:, 100:] = random.choice(halfway, size=(64, 27))
    x = np.concatenate([x.astype(np.float32), np.full((64, 1), 65024, np.float32)], axis=1)  # so that the scale is one
    above = np.clip(np.searchsorted(numbers, np.abs(x)), 1, len(numbers) - 1)
    low, high = numbers[above - 1], numbers[above]
    down, up = np.abs(x) - low, high - np.abs(x)
    nearest = np.where((down < up) | ((down == up) & even[above - 1]), low, high)
    packed = pack(jnp.asarray(x))
    assert packed.packed.dtype == jnp.uint8
    assert np.all(packed.scales == 1)
    np.testing.assert_array_equal(np.asarray(unpack(packed)), np.sign(x) * nearest)


def test_e5m6_scales_and_odd_widths():
    x = np.random.default_rng(5).normal(size=(7, 131)).astype(np.float32) * 1e-6
    back = np.asarray(unpack(pack(jnp.asarray(x))))
    assert np.max(np.abs(back - x)) <= 2.0**-7 * np.max(np.abs(x))
    scales = np.asarray(pack(jnp.asarray(x * 1e9)).scales)
    np.testing.assert_array_equal(np.exp2(np.round(np.log2(scales))), scales)
    assert np.isnan(np.asarray(unpack(pack(jnp.full((1, 128), jnp.inf))))).all()


def test_names_and_fields():
    recipe = Precision.preset("fp8,tile=32,promotion=false")
    assert recipe.fp8 == dataclasses.replace(Fp8Recipe(), tile=32, promotion=False)
    assert recipe.moment_dtype == "bfloat16"
    for name in ("fp8,tile=7", "fp8,nothing=1", "fp8,promotion=2", "fp9"):
        with pytest.raises(ConfigError):
            Precision.preset(name)
