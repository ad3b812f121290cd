"""Checks the networks of experts: their gradients in two halves, against float64 and against autodiff of the whole."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from dsv3_jax.precision import ExpertNetworks, Precision, swiglu
from dsv3_jax.precision.fp8_weight import Fp8Weight

EXPERTS, TOKENS, CHOSEN, WIDTH, INNER = 3, 96, 2, 256, 128


def recipe(name: str) -> Precision:
    """Returns an FP8 recipe whose other arithmetic is in float32."""
    return dataclasses.replace(Precision.preset(name), compute_dtype="float32")


@pytest.fixture(scope="module")
def given() -> dict[str, Any]:
    random = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(random.standard_normal(shape), jnp.float32)

    index = np.stack([random.permutation(EXPERTS)[:CHOSEN] for _ in range(TOKENS)])
    return {
        "tokens": normal(TOKENS, WIDTH),
        "gates": jnp.asarray(random.random((TOKENS, CHOSEN)), jnp.float32),
        "weights": (normal(EXPERTS, 2, INNER, WIDTH) / 16, normal(EXPERTS, WIDTH, INNER) / 12),
        "bar": normal(TOKENS, WIDTH),
        "index": jnp.asarray(index, jnp.int32),
    }


def rounded(x: Any, tile: Any, **options: bool) -> np.ndarray:
    return np.asarray(pk.dequantize(pk.quantize(jnp.asarray(x, jnp.float32), tile=tile, **options)), np.float64)


def test_gradients_in_fp8_are_those_of_the_rounded_operands(given: dict[str, Any]) -> None:
    """The gradient of a row's result is quantized before the gate scales it; the gate's gradient needs no result."""
    networks = ExpertNetworks(recipe("fp8"))

    def combined(tokens: Any, gates: Any, weights: Any) -> Any:
        rows, permutation = pk.permute(tokens, given["index"], EXPERTS, row_alignment=128)
        return networks.combined(rows, gates, weights, permutation, 128)

    y, pull = jax.vjp(combined, given["tokens"], given["gates"], given["weights"])
    tokens_bar, gates_bar, (_, down_bar) = pull(given["bar"])

    powers = {"power_of_two_scales": True}
    x, bar = rounded(given["tokens"], "1x128", **powers), rounded(given["bar"], "1x128", **powers)
    gate_up = rounded(given["weights"][0].reshape(EXPERTS, -1, WIDTH), "128x128")
    down = rounded(given["weights"][1], "128x128")
    gates, index = np.asarray(given["gates"], np.float64), np.asarray(given["index"])
    wanted_y, wanted_tokens, wanted_gates = np.zeros_like(x), np.zeros_like(x), np.zeros_like(gates)
    wanted_down = np.zeros_like(down)
    for k in range(CHOSEN):
        hidden = np.einsum("nd,nhd->nh", x, gate_up[index[:, k]])
        kept = rounded(hidden, "1x128").reshape(TOKENS, 2, INNER)
        activation, restored = (
            np.asarray(swiglu(jnp.asarray(h, jnp.float32)), np.float64) for h in (hidden.reshape(kept.shape), kept)
        )
        result = np.einsum("nh,ndh->nd", rounded(activation, "1x128"), down[index[:, k]])
        wanted_y += gates[:, k, None] * result
        unscaled = np.einsum("nd,ndh->nh", bar, down[index[:, k]])
        wanted_gates[:, k] = np.sum(restored * unscaled, axis=1)
        (hidden_bar,) = jax.vjp(swiglu, jnp.asarray(kept, jnp.float32))[1](
            jnp.asarray(gates[:, k, None] * unscaled, jnp.float32)
        )
        hidden_bar = rounded(hidden_bar.reshape(TOKENS, -1), "1x128")
        wanted_tokens += np.einsum("nh,nhd->nd", hidden_bar, gate_up[index[:, k]])
        np.add.at(wanted_down, index[:, k], np.einsum("n,nd,nh->ndh", gates[:, k], bar, restored))
    np.testing.assert_allclose(y, wanted_y, atol=2e-4)
    # A few numbers of `hidden` are on the edge between two of FP8, and float32 rounds some of them otherwise.
    for found, wanted in ((gates_bar, wanted_gates), (tokens_bar, wanted_tokens)):
        assert np.linalg.norm(found - wanted) < 2e-3 * np.linalg.norm(wanted)
    # Of the weights' gradient both operands are rounded once more, along the rows.
    assert np.linalg.norm(down_bar - wanted_down) < 0.05 * np.linalg.norm(wanted_down)


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [("float32", 1e-6), ("fp8", 1e-6), ("fp8,promotion=false", 2e-3), ("fp8,tile=32,weight_gradient=none", 1e-6)],
)
def test_gradients_by_weights_over_parts_are_added_to_a_total(
    given: dict[str, Any], name: str, tolerance: float
) -> None:
    """Sums in an accumulator of 14 bits depend on what is in it; all others differ by the order of float32 sums."""
    precision = Precision.preset("float32") if name == "float32" else recipe(name)
    networks, weights, parts = ExpertNetworks(precision), given["weights"], []
    for seed, sizes in enumerate(([128, 0, 128], [0, 256, 0])):
        rows, bar = np.random.default_rng(seed).standard_normal((2, 256, WIDTH)).astype(np.float32)
        gates, of_part = jnp.linspace(0, 1, 256), jnp.asarray(sizes, jnp.int32)
        parts.append(networks.row_gradients(jnp.asarray(rows), gates, weights, of_part, 128, jnp.asarray(bar))[2])
    nothing = jax.tree.map(jnp.zeros_like, weights)
    together = networks.add_weight_gradients(weights, jax.tree.map(lambda *x: jnp.stack(x), *parts), 128)
    one, other = (networks.add_weight_gradients(nothing, part, 128) for part in parts)
    for found, before, a, b in zip(*map(jax.tree.leaves, (together, weights, one, other)), strict=True):
        np.testing.assert_allclose(found, before + a + b, rtol=0, atol=tolerance * float(jnp.abs(a + b).max()))


def test_weights_that_are_laid_out_give_the_same_gradients(given: dict[str, Any]) -> None:
    networks, sizes = ExpertNetworks(recipe("fp8")), jnp.asarray([128, 0, 128], jnp.int32)
    rows, bar = np.random.default_rng(2).standard_normal((2, 256, WIDTH)).astype(np.float32)
    arguments = jnp.asarray(rows), jnp.linspace(0, 1, 256)

    def gradients(weights: Any) -> Any:
        return networks.row_gradients(*arguments, weights, sizes, 128, jnp.asarray(bar))

    laid_out = networks.laid_out(given["weights"])
    for weight in laid_out:
        assert isinstance(weight, Fp8Weight)
        assert weight.turned is not None
        np.testing.assert_array_equal(pk.dequantize(weight.turned), weight.astype(jnp.float32).mT)
    for found, wanted in zip(*map(jax.tree.leaves, map(gradients, (laid_out, given["weights"]))), strict=True):
        np.testing.assert_array_equal(found, wanted)
    plain = ExpertNetworks(Precision.preset("bfloat16")).laid_out(given["weights"])
    assert [weight.dtype for weight in plain] == [jnp.bfloat16, jnp.bfloat16]
