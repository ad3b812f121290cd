"""Checks the engine with weights in int8 and in FP8 as published, and with an FP8 cache, against float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import small_model

import dsv3_jax as dsv3
from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import ConfigError
from dsv3_jax.inference import Engine, EngineConfig, Request, Result
from dsv3_jax.inference.product_weights import with_int8_weights
from dsv3_jax.model import DeepSeekV3
from dsv3_jax.precision import Precision
from dsv3_jax.precision.int8_weight import Int8Weight

VOCABULARY = 12
SPARSE = ModelConfig.preset("tiny", vocab_size=VOCABULARY, initializer_range=0.25)
DENSE = SPARSE.replace(first_k_dense_replace=3, num_nextn_predict_layers=0)  # no small error chooses another expert
SETTINGS = {"max_sequences": 4, "context": 64, "page_size": 4, "chunk_sizes": (8,), "steps": 3, "top_logprobs": 3}


def requests() -> list[Request]:
    random = np.random.default_rng(0)
    prompts = [tuple(random.integers(0, VOCABULARY, length).tolist()) for length in (1, 9, 17, 30)]
    return [Request(prompt=prompt, max_new_tokens=20, top_logprobs=2) for prompt in prompts]


def small_engine(model: DeepSeekV3, **changes) -> Engine:
    return Engine(model, EngineConfig(compile_at_start=False, **SETTINGS | {"drafts": 0} | changes))


def assert_near(got: list[Result], want: list[Result], tolerance: float) -> None:
    """Asserts that texts agree until two tokens are nearly equally likely, and log-probabilities until there."""
    compared = 0
    for mine, other in zip(got, want, strict=True):
        for token, wanted, left, right in zip(mine.tokens, other.tokens, mine.logprobs, other.logprobs, strict=True):
            if token != wanted:
                assert right.top[0][1] - right.top[1][1] < 2 * tolerance
                break
            assert abs(left.logprob - right.logprob) < tolerance
            compared += 1
    assert compared > 25  # of 80


@settings(max_examples=8, deadline=None)
@given(st.integers(2, 5), st.integers(1, 9), st.integers(1, 40), st.integers(0, 1000))
def test_an_int8_product_is_as_near_as_its_roundings(rows: int, out: int, inputs: int, seed: int) -> None:
    """Each factor is off by at most half a step of its scale: 1/254 of the largest number of its row."""
    random = np.random.default_rng(seed)
    x, w = random.standard_normal((rows, inputs)), random.standard_normal((out, inputs)) * 3
    x[0] = 0
    got = np.asarray(Int8Weight.of(jnp.asarray(w, jnp.float32)).product(jnp.asarray(x, jnp.float32), jnp.float32))
    half_x, half_w = (np.abs(a).max(axis=1) / 254 for a in (x, w))
    bound = np.abs(x).sum(1)[:, None] * half_w + half_x[:, None] * (np.abs(w).sum(1) + inputs * half_w)
    assert (np.abs(got - x @ w.T) <= 1.0001 * bound + 1e-6).all()


@pytest.mark.slow
def test_int8_weights_keep_the_text_and_its_independence_of_the_batch() -> None:
    model = small_model(DENSE, 3)
    assert_near(small_engine(model, int8_weights=True).run(requests()), small_engine(model).run(requests()), 0.75)

    sparse = small_model(SPARSE, 3)
    engine = small_engine(sparse, int8_weights=True, drafts=2)
    together = engine.run(requests())
    assert [engine.run([request])[0] for request in requests()] == together
    engine.update(sparse)
    assert engine.run(requests()) == together
    assert isinstance(sparse.head.weight.get_value(), jax.Array)
    fp8 = small_model(SPARSE, 3, precision=Precision.preset("fp8"))
    with pytest.raises(ConfigError, match="int8_weights"):
        small_engine(fp8, int8_weights=True)


def test_int8_weights_take_little_more_than_a_quarter_of_float32s_memory() -> None:
    """What stays in float32 are norms, the embedding, routers and the up-projections that decoding absorbs."""
    model = small_model(ModelConfig.preset("mini", num_nextn_predict_layers=0), 0)
    before, after = (_bytes(nnx.state(each)) for each in (model, with_int8_weights(model)))
    in_float32 = _bytes(nnx.state(model.embedding))
    assert after - in_float32 < 0.3 * (before - in_float32)


def _bytes(weights: nnx.State) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(weights))


@pytest.mark.slow
def test_weights_kept_in_fp8_give_the_text_of_the_same_weights_in_float32(tmp_path) -> None:
    dsv3.save_hf(small_model(SPARSE, 3), tmp_path / "fp8", dtype="fp8")
    kept, plain = (dsv3.load_hf(tmp_path / "fp8", keep_fp8=keep) for keep in (True, False))
    assert_near(small_engine(kept, drafts=2).run(requests()), small_engine(plain, drafts=2).run(requests()), 0.05)


def test_an_fp8_cache_keeps_the_text() -> None:
    """A latent's relative error is at most 2^-4, and averages out over the context."""
    model = small_model(DENSE, 3)
    got, want = (small_engine(model, cache_dtype=dtype).run(requests()) for dtype in ("float8_e4m3fn", "float32"))
    assert_near(got, want, 0.2)
