"""Checks attention against float64 and against autodiff of its definition."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interpreted import interpreted_hopper, interpreted_tpu

import pallas_kernels as pk
from pallas_kernels.latent_attention import (
    hopper_backward,
    hopper_forward,
    reference,
    tpu_backward,
    tpu_form,
    tpu_forward,
)
from pallas_kernels.latent_attention.operands import Operands


def operands(batch, length, heads, own, shared, value, segments, seed=0, dtype=jnp.bfloat16):
    """Returns q, k, v, k_shared and segment ids. Some segments are as short as one position, some span tiles."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal((batch, length, *shape)), dtype)

    ids = None
    if segments:
        ids = jnp.asarray(np.sort(rng.integers(0, segments, (batch, length)) ** 2, axis=1), jnp.int32)
    k_shared = normal(shared) if shared else None
    return normal(heads, own + shared), normal(heads, own), normal(heads, value), k_shared, ids


def float64_attention(q, k, v, k_shared, ids, scale, causal):
    q, k, v = (np.asarray(x, "f8") for x in (q, k, v))
    if k_shared is not None:
        rotary = np.broadcast_to(np.asarray(k_shared, "f8")[:, :, None], (*k.shape[:3], k_shared.shape[-1]))
        k = np.concatenate([k, rotary], axis=-1)
    logits = np.einsum("bqhc,bkhc->bhqk", q, k) * scale
    seen = np.asarray(reference.visible(q.shape[1], ids, causal))
    logits = np.where(seen, logits, -np.inf)
    largest = logits.max(-1, keepdims=True)
    weights = np.exp(logits - largest)
    total = weights.sum(-1, keepdims=True)
    return np.einsum("bhqk,bkhv->bqhv", weights / total, v), (largest + np.log(total))[..., 0]


def relative_error(got, wanted):
    return np.linalg.norm(np.asarray(got, "f8") - wanted) / np.linalg.norm(wanted)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("segments", [0, 3])
def test_reference_equals_float64(causal, segments):
    inputs = operands(2, 19, 3, 8, 4, 6, segments, dtype=jnp.float32)
    out, log_sums = reference.attention(Operands(*inputs), 0.3, causal)
    wanted, wanted_log_sums = float64_attention(*inputs, 0.3, causal)
    assert relative_error(out, wanted) < 1e-6
    assert relative_error(log_sums, wanted_log_sums) < 1e-6


@contextlib.contextmanager
def interpreted(device, monkeypatch):
    """Runs the public function's kernels for `device` in their interpreter; Hopper's are checked for races."""
    forward, backward = {"hopper": (hopper_forward, hopper_backward), "tpu": (tpu_forward, tpu_backward)}[device]
    with interpreted_hopper(num_cores=1) if device == "hopper" else interpreted_tpu() as interpret:
        for module, name in ((forward, "forward"), (backward, "backward")):
            monkeypatch.setattr(module, name, functools.partial(getattr(module, name), interpret=interpret))
        yield


# Edges inside of every tile, an odd number of tiles, tiles without any visible pair, a part of keys that is shared, an
# output as wide as the first part of the queries and one that is not, several heads of one block.
CASES = [
    ((1, 140, 2, 32, 16, 32, 0), True),
    pytest.param((1, 300, 1, 32, 0, 16, 5), True, marks=pytest.mark.slow),
    ((1, 130, 1, 16, 16, 32, 3), False),
]


@pytest.mark.parametrize("device", ["hopper", "tpu"])
@pytest.mark.parametrize(("sizes", "causal"), CASES)
def test_kernels_equal_the_definition_and_its_gradients(device, sizes, causal, monkeypatch):
    monkeypatch.setattr(tpu_form, "LARGEST_TILE", 128)
    monkeypatch.setattr(hopper_backward, "BLOCKS_WANTED", 1)  # so that a block has several heads
    if not causal:
        monkeypatch.setattr(hopper_backward, "_queries_at_once", lambda form: 32)  # as for wide heads
    q, k, v, k_shared, ids = operands(*sizes)
    inputs = [q, k, v] if k_shared is None else [q, k, v, k_shared]
    bar = operands(*sizes, seed=1)[2]

    def attend(q, k, v, k_shared=None):
        return pk.latent_attention(q, k, v, k_shared=k_shared, segment_ids=ids, scale=0.2, causal=causal)

    with interpreted(device, monkeypatch):
        out, pull = jax.vjp(attend, *inputs)
        got = jax.block_until_ready(pull(bar))
    wide = [x.astype(jnp.float32) for x in inputs]
    _, pull = jax.vjp(lambda *x: attend(*x), *wide)
    wanted = pull(bar.astype(jnp.float32))
    assert relative_error(out, float64_attention(q, k, v, k_shared, ids, 0.2, causal)[0]) < 2**-8
    for name, x, y in zip(("q", "k", "v", "k_shared"), got, wanted, strict=False):
        assert x.dtype == jnp.bfloat16
        assert relative_error(x, np.asarray(y, "f8")) < 2**-7, name


def test_bad_input_is_named():
    q, k, v, k_shared, _ = operands(1, 8, 2, 16, 16, 16, 0)
    with pytest.raises(ValueError, match=r"q must be \[batch, positions, heads, width\]"):
        pk.latent_attention(q[0], k, v, scale=1.0)
    with pytest.raises(ValueError, match=r"k must be \[1, 8, 2, width\]"):
        pk.latent_attention(q, k[:, :4], v, scale=1.0, k_shared=k_shared)
    with pytest.raises(ValueError, match=r"k_shared must be \[1, 8, width\]"):
        pk.latent_attention(q, k, v, scale=1.0, k_shared=k)
    with pytest.raises(ValueError, match=r"keys are 16 \+ 0 wide and q 32"):
        pk.latent_attention(q, k, v, scale=1.0)
    with pytest.raises(ValueError, match=r"segment_ids must have shape \(1, 8\)"):
        pk.latent_attention(q, k, v, scale=1.0, k_shared=k_shared, segment_ids=jnp.zeros((8,), jnp.int32))
    with pytest.raises(TypeError, match="v must be bfloat16 as q is, not float32"):
        pk.latent_attention(q, k, v.astype("f4"), scale=1.0, k_shared=k_shared)
    with pytest.raises(ValueError, match="scale must be positive"):
        pk.latent_attention(q, k, v, scale=-1.0, k_shared=k_shared)
    with pytest.raises(ValueError, match="cannot run here"):
        pk.latent_attention(q, k, v, scale=1.0, k_shared=k_shared, implementation="hopper")
