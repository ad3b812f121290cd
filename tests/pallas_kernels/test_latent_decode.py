"""Checks absorbed decoding over pages against float64: shared and scattered pages, empty and ragged sequences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interpreted import interpreted_hopper, interpreted_tpu

import pallas_kernels as pk
from pallas_kernels.latent_decode import hopper, tpu

SCALE = 0.2


def operands(tokens, heads, page, pages_each, positions, seed=0, dtype=jnp.bfloat16, width=32):
    """Returns the operands; two sequences share a page, and pages after a sequence's last position do not exist."""
    rng, pages = np.random.default_rng(seed), 12

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    positions = np.asarray(positions, np.int32)
    table = np.stack([rng.permutation(pages)[:pages_each] for _ in positions]).astype(np.int32)
    table[1, 0] = table[0, 0]
    for row, last in zip(table, positions.max(axis=1), strict=True):
        row[(last + page) // page :] = pages
    return (
        normal(len(positions), tokens, heads, width),
        normal(len(positions), tokens, heads, 16),
        normal(pages, page, width),
        normal(pages, page, 16),
        jnp.asarray(table),
        jnp.asarray(positions),
    )


def with_fp8_latents(q_latent, q_rope, latents, rope_keys, table, positions):
    """Returns the operands with latents in e4m3, and a scale for each entry; scales differ by orders of magnitude."""
    scales = np.exp(np.random.default_rng(1).uniform(-4, 1, latents.shape[:2])).astype("f4")
    return (q_latent, q_rope, latents.astype(jnp.float8_e4m3fn), rope_keys, table, positions), jnp.asarray(scales)


def float64_decode(q_latent, q_rope, latents, rope_keys, table, positions, first=0, scales=None):
    latents = np.asarray(latents, "f8") * (1 if scales is None else np.asarray(scales, "f8")[..., None])
    q = np.concatenate([np.asarray(x, "f8") for x in (q_latent, q_rope)], axis=-1)
    keys = np.concatenate([np.asarray(x, "f8") for x in (latents, rope_keys)], axis=-1)
    out = np.zeros(q_latent.shape)
    for b, t, h in np.ndindex(*q.shape[:3]):
        seen = int(positions[b, t]) + 1
        if seen > first:
            used = keys[np.asarray(table[b])[: -(-seen // keys.shape[1])]].reshape(-1, keys.shape[-1])[first:seen]
            logits = SCALE * used @ q[b, t, h]
            weights = np.exp(logits - logits.max())
            out[b, t, h] = weights @ used[:, : out.shape[-1]] / weights.sum()
    return out


# Pages smaller and larger than what a step reads; sequences of no entry, one, and all; two tokens, of which the second
# sees one more entry; more rows of queries than one block has; the first entries hidden from all.
CASES = [
    ((1, 3, 8, 10, [[-1], [0], [79], [13]]), 2, 0),
    ((2, 40, 64, 2, [[0, 1], [126, 127]]), 1, 1),
]


@pytest.mark.parametrize(("sizes", "parts", "first"), CASES)
def test_reference_equals_float64(sizes, parts, first):
    inputs = operands(*sizes, dtype=jnp.float32)
    out = pk.latent_decode(*inputs, scale=SCALE, first=first)
    assert np.abs(np.asarray(out) - float64_decode(*inputs, first)).max() < 1e-5


@pytest.mark.parametrize(("sizes", "parts", "first"), CASES)
def test_reference_with_fp8_latents_equals_float64(sizes, parts, first):
    inputs, scales = with_fp8_latents(*operands(*sizes, dtype=jnp.float32))
    out = pk.latent_decode(*inputs, scale=SCALE, first=first, scales=scales)
    assert np.abs(np.asarray(out) - float64_decode(*inputs, first, scales)).max() < 1e-5


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("device", ["hopper", "tpu"])
@pytest.mark.parametrize(("sizes", "parts", "first"), CASES)
def test_kernels_equal_float64(device, sizes, parts, first, fp8, monkeypatch):
    inputs, scales = operands(*sizes, width=64 if fp8 else 32), None
    if fp8:
        inputs, scales = with_fp8_latents(*inputs)
    with interpreted_hopper(num_cores=1) if device == "hopper" else interpreted_tpu() as interpret:
        kernel, more = (hopper, {"parts": parts}) if device == "hopper" else (tpu, {})
        monkeypatch.setattr(kernel, "decode", functools.partial(kernel.decode, interpret=interpret, **more))
        out = jax.block_until_ready(pk.latent_decode(*inputs, scale=SCALE, first=first, scales=scales))
    wanted = float64_decode(*inputs, first, scales)
    assert np.linalg.norm(np.asarray(out, "f8") - wanted) / np.linalg.norm(wanted) < 2**-8


def test_bad_input_is_named():
    q_latent, q_rope, latents, rope_keys, table, positions = operands(*CASES[0][0])
    decode = functools.partial(pk.latent_decode, scale=SCALE)
    with pytest.raises(ValueError, match=r"latents must be \[pages, page, 32\]"):
        decode(q_latent, q_rope, rope_keys, rope_keys, table, positions)
    with pytest.raises(ValueError, match=r"positions must have shape \(4, 1\)"):
        decode(q_latent, q_rope, latents, rope_keys, table, positions[:3])
    with pytest.raises(TypeError, match="rope_keys must be bfloat16"):
        decode(q_latent, q_rope, latents, rope_keys.astype("f4"), table, positions)
    with pytest.raises(TypeError, match="latents must be float8_e4m3fn, with scales, not bfloat16"):
        decode(q_latent, q_rope, latents, rope_keys, table, positions, scales=jnp.ones(latents.shape[:2]))
    with pytest.raises(ValueError, match="scales must have shape"):
        decode(q_latent, q_rope, latents.astype("float8_e4m3fn"), rope_keys, table, positions, scales=jnp.ones(3))
    assert decode(q_latent, q_rope, latents, rope_keys, table, positions).dtype == jnp.bfloat16
