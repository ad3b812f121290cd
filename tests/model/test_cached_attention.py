"""Checks that decoding over pages calls the kernel with the pages of the right layer, where there is one."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from dsv3_jax.modules.cached_attention import attend_to_cache
from dsv3_jax.modules.latent_cache import DenseCache
from dsv3_jax.modules.paged_cache import PagedCache, Pages
from pallas_kernels.hopper_launch import hopper_target

LAYERS, PAGES, PAGE, RANK, ROPE, HEADS = 3, 5, 8, 32, 16, 2


def paged(dtype=jnp.bfloat16) -> PagedCache:
    """Returns a cache of random entries; the second sequence has one page, which is the first one's last."""
    rng = np.random.default_rng(0)
    latent, rope_key = (jnp.asarray(rng.normal(size=(LAYERS, PAGES, PAGE, w)), dtype) for w in (RANK, ROPE))
    return PagedCache(Pages(latent, rope_key, None, None), jnp.asarray([[4, 1, 2], [2, PAGES, PAGES]], jnp.int32))


def arguments(dtype=jnp.bfloat16):
    rng = np.random.default_rng(1)
    queries = (jnp.asarray(rng.normal(size=(2, 2, HEADS, w)), dtype) for w in (RANK, ROPE))
    return *queries, jnp.asarray([[19, 20], [-1, 5]], jnp.int32)


@pytest.fixture
def calls(monkeypatch):
    """Has the kernel's definition called in its place, and returns the list of the calls."""
    made = []

    def decode(*operands, scale, first):
        made.append(operands)
        return definition(*operands, scale=scale, first=first, implementation="reference")

    definition = pallas_kernels.latent_decode
    monkeypatch.setattr(pallas_kernels, "latent_decode", decode)
    return made


def attend(cache, layer, queries, rope_queries, positions):
    return attend_to_cache(queries, rope_queries, cache, layer, positions, first=1, scale=0.2)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_the_kernel_reads_the_layers_own_pages(calls, layer):
    wanted = attend(paged(), layer, *arguments())
    assert not calls
    with hopper_target():
        got = jax.jit(functools.partial(attend, paged()))(jnp.int32(layer), *arguments())
    assert len(calls) == 1
    np.testing.assert_allclose(got.astype("f4"), wanted.astype("f4"), atol=2**-6)
    assert not np.any(got[1, 0])  # a query at position -1 sees nothing


def test_only_what_the_kernel_takes_is_given_to_it(calls):
    inputs, dense = arguments(), DenseCache.empty(LAYERS, 2, 24, RANK, ROPE, jnp.bfloat16)
    pages = paged().pages
    fp8 = Pages(pages.latent.astype("float8_e4m3fn"), pages.rope_key, jnp.ones(pages.latent.shape[:3]), None)
    with hopper_target():
        attend(dense, 0, *inputs)
        attend(PagedCache(fp8, paged().table), 0, *inputs)
        attend(paged(jnp.float32), 0, *arguments(jnp.float32))
    assert not calls
