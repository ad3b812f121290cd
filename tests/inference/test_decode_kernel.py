"""Checks the engine with the paged decoding kernel of an accelerator: the operation, the text, and the lowering."""

from __future__ import annotations

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import small_model

import pallas_kernels
from dsv3_jax.config import ModelConfig
from dsv3_jax.inference import Engine, EngineConfig, Request, Sampler
from dsv3_jax.model import abstract_model
from dsv3_jax.modules.cached_attention import attend_to_cache
from dsv3_jax.modules.paged_cache import PagedCache, Pages
from dsv3_jax.precision import Precision
from pallas_kernels.hopper_launch import hopper_target

VOCABULARY = 12
WIDE = ModelConfig.preset("tiny", vocab_size=VOCABULARY, initializer_range=0.25, kv_lora_rank=32, qk_rope_head_dim=16)


def test_pages_of_every_layer_are_read_as_by_the_plain_form() -> None:
    """Each of several layers, a first entry that is hidden, rows of padding, and tables without some pages."""
    pages = Pages.empty(WIDE, 5, 8, jnp.dtype(jnp.float32), mtp=True)
    random = np.random.default_rng(0)
    pages = jax.tree.map(lambda x: jnp.asarray(random.standard_normal(x.shape), x.dtype), pages)
    cache = PagedCache(pages, jnp.asarray([[3, 1, 5], [0, 5, 5], [2, 4, 5]]))
    queries, rope_queries = (jnp.asarray(random.standard_normal((3, 2, 4, width)), jnp.float32) for width in (32, 16))
    positions = jnp.asarray([[14, 15], [1, -1], [8, 9]])

    @functools.partial(jax.jit, static_argnames=("kernel", "first"))
    def attend(layer: jax.Array, *, kernel: bool, first: int) -> jax.Array:
        with mock.patch.object(pallas_kernels, "has_decode_kernel", return_value=kernel):
            return attend_to_cache(queries, rope_queries, cache, layer, positions, first=first, scale=0.3)

    for layer in range(4):
        for first in (0, 1):
            got, want = (attend(jnp.asarray(layer), kernel=kernel, first=first) for kernel in (True, False))
            np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("drafts", [0, 1])
@pytest.mark.slow
def test_the_text_is_that_of_the_plain_form(drafts: int) -> None:
    model = small_model(WIDE, 3)
    random = np.random.default_rng(0)
    requests = [
        Request(
            prompt=tuple(random.integers(0, VOCABULARY, length).tolist()),
            max_new_tokens=8,
            sampler=Sampler(temperature=0.5 * (length % 2)),
        )
        for length in (1, 9, 22)
    ]
    config = EngineConfig(
        max_sequences=2, context=32, page_size=8, chunk_sizes=(8,), steps=3, drafts=drafts, compile_at_start=False
    )
    want = Engine(model, config).run(requests)
    jax.clear_caches()
    with mock.patch.object(pallas_kernels, "has_decode_kernel", return_value=True) as asked:
        got = Engine(model, config).run(requests)
    assert asked.called
    assert [result.tokens for result in got] == [result.tokens for result in want]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float8_e4m3fn])
def test_decoding_lowers_for_hopper(dtype) -> None:
    """With a kernel where the cache is bfloat16; a cache in FP8 is read by the plain form."""
    model = abstract_model(WIDE, precision=Precision.preset("bfloat16"), param_dtype=jnp.bfloat16)
    graph, state = nnx.split(model)
    pages = jax.eval_shape(lambda: Pages.empty(WIDE, 5, 8, jnp.dtype(dtype), mtp=True))
    ids, table = jax.ShapeDtypeStruct((3, 2), jnp.int32), jax.ShapeDtypeStruct((3, 4), jnp.int32)

    def decode(state: nnx.State, pages: Pages, table: jax.Array, ids: jax.Array, positions: jax.Array) -> jax.Array:
        return nnx.merge(graph, state).decode(ids, PagedCache(pages, table), positions).hidden

    with hopper_target():
        traced = jax.jit(decode).trace(state, pages, table, ids, ids)
        lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
    kernels = str(traced.jaxpr).count("latent_decode")
    assert (kernels > 0) == (dtype == jnp.bfloat16)
    assert ("mosaic_gpu" in lowered) or not kernels
