"""Checks absorbed decoding over pages against float64: shared and scattered pages, empty and ragged sequences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interpreted import interpreted_hopper, interpreted_tpu

import pallas_kernels as pk
from pallas_kernels.latent_decode import hopper, reference, tpu

SCALE = 0.2


def operands(tokens, heads, page, pages_each, positions, seed=0, dtype=jnp.bfloat16):
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
        normal(len(positions), tokens, heads, 32),
        normal(len(positions), tokens, heads, 16),
        normal(pages, page, 32),
        normal(pages, page, 16),
        jnp.asarray(table),
        jnp.asarray(positions),
    )


def float64_decode(q_latent, q_rope, latents, rope_keys, table, positions, first):
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


@pytest.mark.parametrize("device", ["hopper", "tpu"])
@pytest.mark.parametrize(("sizes", "parts", "first"), CASES)
def test_kernels_equal_float64(device, sizes, parts, first, monkeypatch):
    inputs = operands(*sizes)
    with interpreted_hopper(num_cores=1) if device == "hopper" else interpreted_tpu() as interpret:
        kernel, more = (hopper, {"parts": parts}) if device == "hopper" else (tpu, {})
        monkeypatch.setattr(kernel, "decode", functools.partial(kernel.decode, interpret=interpret, **more))
        out = jax.block_until_ready(pk.latent_decode(*inputs, scale=SCALE, first=first))
    wanted = float64_decode(*inputs, first)
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
    assert reference.decode(q_latent, q_rope, latents, rope_keys, table, positions, SCALE).dtype == jnp.bfloat16
