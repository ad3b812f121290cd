"""Checks attention whose output is kept once, for its own backward pass and for that of the next linear map."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_latent_attention import float64_attention, interpreted, operands, relative_error

import pallas_kernels as pk
from dsv3_jax.modules.attention_core import CoreAttention
from dsv3_jax.modules.rematerialisation import rematerialise
from dsv3_jax.precision import AttendedRows, KeptOutput, Precision, linear
from dsv3_jax.precision.e5m6 import pack, unpack
from pallas_kernels.device import described_target

SIZES = (1, 130, 2, 16, 16, 128, 3)  # batch, length, heads, own and shared columns of keys, values, segments
SCALE = 0.2


def test_the_recipe_says_how_the_output_is_kept() -> None:
    assert KeptOutput.of(Precision.preset("bfloat16"), 128) == KeptOutput(packs=False)
    assert KeptOutput.of(Precision.preset("fp8"), 128) == KeptOutput(packs=True)
    assert KeptOutput.of(Precision.preset("fp8"), 64) is None
    assert KeptOutput.of(Precision.preset("fp8,after_attention=e4m3"), 128) is None


@pytest.mark.parametrize("device", ["hopper", "tpu"])
def test_gradients_are_those_of_the_kept_output(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64: dL = P * (dP - sum_v o_v do_v) with o rounded to E5M6, which is far off the exact one here."""
    q, k, v, k_shared, ids = operands(*SIZES)
    bar = operands(*SIZES, seed=1)[2]

    class Coarse(KeptOutput):
        def restore(self, packed: Any, like: jax.Array) -> jax.Array:
            return (1.5 * super().restore(packed, like).astype(jnp.float32)).astype(like.dtype)

    def gradients(keep: KeptOutput) -> tuple[jax.Array, ...]:
        def attend(q: jax.Array, k: jax.Array, v: jax.Array, k_shared: jax.Array) -> jax.Array:
            call: dict[str, Any] = {"scale": SCALE, "k_shared": k_shared, "segment_ids": ids, "keep": keep}
            return pk.latent_attention_and_kept(q, k, v, **call)[0]

        out, pull = jax.vjp(attend, q, k, v, k_shared)
        return out, *pull(bar)

    with interpreted(device, monkeypatch):
        found = jax.block_until_ready([gradients(KeptOutput(packs=True)), gradients(Coarse(packs=True))])
    for factor, (out, *got) in zip((1.0, 1.5), found, strict=True):
        kept = factor * np.asarray(unpack(pack(out.reshape(-1, 128))), "f8").reshape(out.shape)
        wanted = float64_gradients(q, k, v, k_shared, ids, kept, np.asarray(bar, "f8"))
        for name, x, y in zip(("q", "k", "v", "k_shared"), got, wanted, strict=True):
            assert relative_error(x, y) < 2**-7, (factor, name)


def test_without_a_kernel_it_is_refused() -> None:
    q, k, v, k_shared, _ = operands(*SIZES)
    with pytest.raises(ValueError, match="no attention kernel takes these operands on cpu"):
        pk.latent_attention_and_kept(q, k, v, k_shared=k_shared, scale=SCALE, keep=KeptOutput(packs=True))


def float64_gradients(
    q: Any, k: Any, v: Any, k_shared: Any, ids: Any, out: np.ndarray, bar: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Returns the gradients by q, k, v and k_shared of causal attention that gave `out`."""
    q, k, v, k_shared = (np.asarray(x, "f8") for x in (q, k, v, k_shared))
    keys = np.concatenate([k, np.broadcast_to(k_shared[:, :, None], (*k.shape[:3], k_shared.shape[-1]))], axis=-1)
    _, log_sums = float64_attention(q, k, v, k_shared, ids, SCALE, True)
    seen = np.tril(np.ones((q.shape[1],) * 2, bool)) & (np.asarray(ids)[0][:, None] == np.asarray(ids)[0])
    weights = np.where(seen, np.exp(np.einsum("bqhc,bkhc->bhqk", q, keys) * SCALE - log_sums[..., None]), 0)
    by_weights = np.einsum("bqhv,bkhv->bhqk", bar, v)
    mean = np.einsum("bqhv,bqhv->bhq", out, bar)
    by_logits = weights * (by_weights - mean[..., None]) * SCALE
    by_keys = np.einsum("bhqk,bqhc->bkhc", by_logits, q)
    own = k.shape[-1]
    return (
        np.einsum("bhqk,bkhc->bqhc", by_logits, keys),
        by_keys[..., :own],
        np.einsum("bhqk,bqhv->bkhv", weights, bar),
        by_keys[..., own:].sum(axis=2),
    )


@pytest.mark.parametrize("precision", ["bfloat16", "fp8"])
def test_the_report_policy_computes_attention_once(precision: str) -> None:
    """Once for the forward pass and for all gradients; where the output is not kept for both, attention runs again."""
    recipe = Precision.preset(precision)
    q, k, v, k_shared, ids = operands(*SIZES)
    assert k_shared is not None
    weight = jnp.asarray(np.random.default_rng(2).standard_normal((128, 256)), jnp.float32)

    def forward_kernels(kept: KeptOutput | None) -> int:
        attention = CoreAttention(SCALE, "auto", kept)

        def layer(q: jax.Array, weight: jax.Array) -> jax.Array:
            attended = attention(q, k, v, k_shared, ids)
            assert isinstance(attended, AttendedRows) == (kept is not None)
            return linear(attended.reshape(1, 130, 256), weight, recipe, after_attention=True)

        def loss(q: jax.Array, weight: jax.Array) -> jax.Array:
            return jnp.sum(jnp.sin(rematerialise(layer, "report")(q, weight).astype(jnp.float32)))

        with described_target("TPU v6e", "tpu"):
            program = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(q, weight)
        return str(program).count("name=latent_attention_forward")

    assert forward_kernels(KeptOutput.of(recipe, 128)) == 1
    assert forward_kernels(None) == 2


def test_a_linear_map_has_the_same_bits_with_rows_that_are_kept_already() -> None:
    """Its output and both gradients, in FP8."""
    random = np.random.default_rng(3)
    rows = jnp.asarray(random.standard_normal((2, 5, 2, 128)), jnp.bfloat16)
    weight = jnp.asarray(random.standard_normal((128, 256)), jnp.float32)
    recipe, kept = Precision.preset("fp8"), KeptOutput(packs=True)

    def both(is_kept: bool) -> list[jax.Array]:
        def product(rows: jax.Array, weight: jax.Array) -> jax.Array:
            x = rows
            if is_kept:
                out, packed, _ = kept.keep(rows, jnp.zeros(()))
                x = AttendedRows(out, packed)
            return linear(x.reshape(2, 5, 256), weight, recipe, after_attention=True)

        out, pull = jax.vjp(product, rows, weight)
        return [out, *pull(jnp.cos(out.astype(jnp.float32)).astype(out.dtype))]

    for plain, found in zip(both(False), both(True), strict=True):
        np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(plain, np.float32))
