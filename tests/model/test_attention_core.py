"""Checks attention in tiles against a direct softmax in float64, with its gradients and the size of its program."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, PartitionSpec
from simulated import run_simulated

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import UserError
from dsv3_jax.model import DeepSeekV3
from dsv3_jax.modules import attention_core
from dsv3_jax.modules.attention_core import causal_attention
from dsv3_jax.modules.rematerialisation import rematerialise
from dsv3_jax.modules.tiled_attention import tiled_attention
from dsv3_jax.precision import Precision
from pallas_kernels.hopper_launch import hopper_target
from pallas_kernels.latent_attention import cudnn

BATCH, HEADS, QK, V = 2, 3, 8, 5
CHUNK = 16


def see(length: int, segments: np.ndarray | None) -> np.ndarray:
    visible = np.tril(np.ones((length, length), bool))[None, None]
    return visible if segments is None else visible & (segments[:, None, :, None] == segments[:, None, None, :])


def expected(q, k, v, do, segments, scale) -> list[np.ndarray]:
    """Returns softmax(scale q k^T) v over whole rows in float64, and its gradients by the product rule."""
    q, k, v, do = (np.asarray(x, np.float64) for x in (q, k, v, do))
    logits = np.where(see(q.shape[1], segments), scale * np.einsum("bqhc,bshc->bhqs", q, k), -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    dweights = np.einsum("bqhv,bshv->bhqs", do, v)
    dlogits = scale * weights * (dweights - (weights * dweights).sum(-1, keepdims=True))
    return [
        np.einsum("bhqs,bshv->bqhv", weights, v),
        np.einsum("bhqs,bshc->bqhc", dlogits, k),
        np.einsum("bhqs,bqhc->bshc", dlogits, q),
        np.einsum("bhqs,bqhv->bshv", weights, do),
    ]


def inputs(length: int, dtype: Any, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(BATCH, length, HEADS, width)).astype(dtype) for width in (QK, QK, V, V)]


def make_segments(kind: str | None, length: int, seed: int = 0) -> np.ndarray | None:
    """Returns ids of a few long segments per row, or of many shorter than a tile, with padding (id 0) at the end."""
    if kind is None:
        return None
    rng = np.random.default_rng(seed)
    ids = 1 + np.cumsum(rng.random((BATCH, length)) < {"few": 0.05, "many": 0.5}[kind], axis=1, dtype=np.int32)
    ids[0, length - length // 3 :] = 0
    return ids


def with_gradients(attend):
    def both(q, k, v, do, segments):
        out, back = jax.vjp(lambda q, k, v: attend(q, k, v, segments), q, k, v)
        return [out, *back(do)]

    return jax.jit(both)


def tiled(scale: float, chunk: int = CHUNK):
    return with_gradients(lambda q, k, v, segments: tiled_attention(q, k, v, segments, scale, chunk))


def check(found, wanted, dtype, steps=8) -> None:
    """Checks that errors are within so many roundings of the largest element, or of 1, the size of the inputs."""
    for name, ours, theirs in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True):
        assert ours.dtype == dtype, name
        bound = steps * float(jnp.finfo(dtype).eps) * max(np.abs(theirs).max(), 1.0)
        np.testing.assert_allclose(np.asarray(ours, np.float64), theirs, rtol=0, atol=bound, err_msg=name)


def test_the_oracle_against_autodiff():
    def plain(q, k, v, segments):
        logits = jnp.where(see(CHUNK, segments), 0.3 * jnp.einsum("bqhc,bshc->bhqs", q, k), -jnp.inf)
        return jnp.einsum("bhqs,bshv->bqhv", jax.nn.softmax(logits, axis=-1), v)

    arrays, ids = inputs(CHUNK, np.float64), make_segments("few", CHUNK)
    with jax.enable_x64(True):
        found = with_gradients(lambda q, k, v, _: plain(q, k, v, ids))(*map(jnp.asarray, arrays), None)
    check(found, expected(*arrays, ids, 0.3), "float64")


@pytest.mark.parametrize(
    ("length", "segments", "dtype"),
    [
        (CHUNK, None, "float32"),
        (CHUNK + 1, "many", "float32"),
        (2 * CHUNK, None, "float64"),
        (3 * CHUNK, "few", "float32"),
        (3 * CHUNK - 5, "many", "float64"),
        (4 * CHUNK - 15, None, "float32"),
        (5 * CHUNK, "many", "float32"),
        (5 * CHUNK - 3, "few", "bfloat16"),
    ],
)
def test_tiles_against_float64(length, segments, dtype):
    given_arrays = inputs(length, jnp.dtype(dtype))
    ids = make_segments(segments, length)
    with jax.enable_x64(dtype == "float64"):
        found = tiled(0.3)(*map(jnp.asarray, given_arrays), ids)
    check(found, expected(*given_arrays, ids, 0.3), dtype)


@settings(max_examples=4, deadline=None)
@given(
    length=st.integers(1, 40),
    chunk=st.sampled_from([8, 13]),
    kind=st.sampled_from([None, "few", "many"]),
    spread=st.sampled_from([0.0, 0.3, 300.0]),
    seed=st.integers(0, 2**16),
)
def test_any_length_and_logits_of_any_size(length, chunk, kind, spread, seed):
    """With logits in the thousands weights are 0 or 1, and float32 must choose the same ones as float64."""
    given_arrays = inputs(length, np.float32, seed)
    ids = make_segments(kind, length, seed)
    found = tiled(spread, chunk)(*map(jnp.asarray, given_arrays), ids)
    # Rounding errors grow with the logits, and enter the weights.
    check(found, expected(*given_arrays, ids, spread), "float32", steps=8 + 100 * spread)


@pytest.mark.parametrize("segments", [None, "few"])
def test_short_and_long_form_agree(monkeypatch, segments):
    arrays, ids = [jnp.asarray(x) for x in inputs(43, np.float32)], make_segments(segments, 43)
    attend = functools.partial(causal_attention, scale=0.3, query_chunk=CHUNK)
    forms = []
    for longest in (64, 32):
        monkeypatch.setattr(attention_core, "KEPT_LENGTH", longest)
        forms.append(with_gradients(lambda q, k, v, segments: attend(q, k, v, segment_ids=segments))(*arrays, ids))
    for short, long in zip(*forms, strict=True):
        np.testing.assert_allclose(long, short, atol=3e-6)


def test_padding_to_whole_chunks_changes_nothing():
    """Padding to whole chunks changes no bit of the outputs of real positions or of their gradients."""
    arrays = inputs(2 * CHUNK - 3, np.float32)
    filled = [np.pad(x, ((0, 0), (0, 3), (0, 0), (0, 0))) for x in arrays]
    short, whole = tiled(0.3)(*arrays, None), tiled(0.3)(*filled, None)
    for a, b in zip(short, whole, strict=True):
        np.testing.assert_array_equal(a, b[:, :-3])


def products(jaxpr, times: int = 1) -> list[tuple[int, int]]:
    """Returns the multiplications of each matrix product in a jaxpr, and how often it is computed."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contract, _), _ = equation.params["dimension_numbers"]
            widths = [equation.invars[0].aval.shape[axis] for axis in contract]
            found.append((equation.outvars[0].aval.size * int(np.prod(widths)), times))
        runs = times * equation.params.get("length", 1) if equation.primitive.name == "scan" else times
        for inner in jaxprs_in_params(equation.params):
            found += products(inner, runs)
    return found


def equations(jaxpr) -> int:
    return sum(1 + sum(map(equations, jaxprs_in_params(equation.params))) for equation in jaxpr.eqns)


def traced(length: int):
    shapes = [jax.ShapeDtypeStruct((1, length, 1, width), jnp.float32) for width in (QK, QK, V, V)]
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
    attend = with_gradients(lambda q, k, v, segments: causal_attention(q, k, v, scale=0.3, segment_ids=segments))
    return jax.make_jaxpr(attend)(*shapes, ids).jaxpr


@pytest.mark.parametrize(
    ("length", "chunk", "chunks"), [(1025, 384, 3), (2048, 512, 4), (4096, 512, 8), (4097, 512, 9), (131072, 512, 256)]
)
def test_only_the_triangle_is_computed(length, chunk, chunks):
    """There are two products per tile in the forward pass and five in the backward pass, for n (n + 1) / 2 tiles."""
    triangle = chunks * (chunks + 1) // 2
    assert sorted(products(traced(length))) == sorted((chunk * chunk * w, triangle) for w in (QK, V, QK, QK, QK, V, V))


def test_the_program_does_not_grow_with_the_length():
    assert equations(traced(2048)) == equations(traced(131072))
    assert {times for _, times in products(traced(1024))} == {1}


@pytest.mark.parametrize(("gradients", "most"), [(False, 0.9), (True, 2.0)])
def test_a_cpu_keeps_no_logits_of_a_short_sequence(gradients, most):
    """Memory in float32 logits: weights in bfloat16 are half of them, and the gradients of weights are all of them."""
    length = 512
    q, k, v = (jax.ShapeDtypeStruct((2, length, 4, width), jnp.bfloat16) for width in (48, 48, 32))

    def attend(q, k, v):
        return causal_attention(q, k, v, scale=0.1)

    def pull(q, k, v):
        return jax.vjp(attend, q, k, v)[1](v)

    compiled = jax.jit(pull if gradients else attend).lower(q, k, v).compile()
    if "ynn_fusion" not in compiled.as_text():
        pytest.skip("XLA computes products in another way on this processor")
    logits = 4 * 2 * 4 * length * length * 3 / 4  # of both chunks
    assert compiled.memory_analysis().temp_size_in_bytes < most * logits


@pytest.mark.parametrize("policy", ["report", "products"])  # by their names, and by their operation
def test_recomputed_layers_in_a_loop(policy):
    """Gradients through stacked layers are those of the layers one after the other, in float64."""
    (q, k, _, _), weights = inputs(2 * CHUNK - 1, np.float64), np.random.default_rng(1).normal(size=(2, QK, QK))

    def layer(x, weight):
        return x + tiled_attention(x @ weight, k, x, None, 0.3, CHUNK)

    def in_a_loop(x, weights):
        body = rematerialise(layer, policy)
        return jax.lax.scan(lambda x, w: (body(x, w), None), x, weights)[0].sum()

    def one_after_the_other(x, weights):
        plainly = functools.partial(causal_attention, scale=0.3)
        for weight in weights:
            x = x + plainly(x @ weight, k, x)
        return x.sum()

    with jax.enable_x64(True):
        k = jnp.asarray(k)
        gradients = [
            jax.jit(jax.grad(f, (0, 1)))(jnp.asarray(q), jnp.asarray(weights)) for f in (in_a_loop, one_after_the_other)
        ]
    for a, b in zip(*gradients, strict=True):
        assert a.dtype == np.float64
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-13 * np.abs(b).max())


def test_inside_a_manual_mesh():
    """The loops' state varies over the axes that the arrays vary over, which shard_map checks."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    arrays = [jnp.asarray(x) for x in inputs(CHUNK + 1, np.float32)]
    ids = make_segments("few", CHUNK + 1)
    spec = PartitionSpec("data")
    manual = jax.shard_map(tiled(0.3), mesh=mesh, in_specs=spec, out_specs=[spec] * 4)
    for a, b in zip(jax.jit(manual)(*arrays, ids), tiled(0.3)(*arrays, ids), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_a_mesh_needs_no_communication():
    """With sequences and heads sharded over two axes, results are one device's and the program has no collective."""
    found = run_simulated(Path(__file__).parent / "simulated_tiles.py")
    near_zero = pytest.approx(0, abs=2e-6)
    assert found.pop("kept on ranks") < 2e-3  # a wrong head or row would be off by 1
    assert found == {"collectives": [], "largest difference": near_zero, "on ranks": near_zero}


def test_on_hopper_the_kernel_is_chosen():
    """The rotary keys that heads share reach it as they are; other dtypes and widths are computed tile by tile."""

    def program(width: int, dtype: str) -> str:
        def shapes(*sizes: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((1, 2048, *sizes), dtype)

        arrays = shapes(2, width + 16), shapes(2, width), shapes(2, 48), shapes(16)
        with hopper_target():
            return str(jax.make_jaxpr(lambda *x: causal_attention(*x, scale=0.3))(*arrays))

    assert "latent_attention_forward" in program(32, "bfloat16")
    assert "latent_attention_forward" not in program(32, "float32")
    assert "latent_attention_forward" not in program(36, "bfloat16")


def test_cudnn_is_called_on_a_gpu_only(monkeypatch):
    calls = []

    def attention(x, scale, causal):
        calls.append((scale, causal, x.k_shared.shape))
        return x.v

    monkeypatch.setattr(cudnn, "attention", attention)
    q, k, v = (jnp.ones((1, 8, 2, width), jnp.bfloat16) for width in (48, 32, 32))
    shared = jnp.ones((1, 8, 16), jnp.bfloat16)
    attend = functools.partial(causal_attention, scale=0.3, choice="cudnn")
    assert attend(q, k, v, shared).shape == v.shape
    assert not calls
    with hopper_target():
        jax.eval_shape(attend, q, k, v, shared)
        with pytest.raises(UserError, match="does not keep documents apart"):
            attend(q, k, v, shared, segment_ids=jnp.ones((1, 8), jnp.int32))
        with pytest.raises(UserError, match="takes bfloat16, not float32"):
            attend(*(x.astype("f4") for x in (q, k, v, shared)))
    assert calls == [(0.3, True, shared.shape)]


def test_a_model_computes_its_choice(monkeypatch):
    """Plain products are chosen even where there is a kernel, in layers and in MTP modules."""
    config = ModelConfig.preset("tiny", qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16)
    tokens = jax.ShapeDtypeStruct((1, 12), jnp.int32)

    def program(choice):
        make = functools.partial(DeepSeekV3, config, precision=Precision.preset("bfloat16"), attention=choice)
        with hopper_target():
            graph, state = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
            return str(jax.make_jaxpr(lambda state, tokens: nnx.merge(graph, state)(tokens).logits)(state, tokens))

    assert "latent_attention_forward" in program("auto")
    assert "latent_attention_forward" not in program("scan")
