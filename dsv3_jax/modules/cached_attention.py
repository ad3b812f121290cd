"""Attention to a latent cache, block by block, with absorbed queries (report Eq. 10 on the cached latents).

The softmax is computed in one pass over the blocks: a running maximum, a running sum and a running weighted sum of
latents. A block in which a row sees nothing leaves its three numbers as they are, bit for bit. A row's result therefore
does not depend on how many blocks other rows of the batch need.

Where there is a kernel for the device and the cache is in pages, `pallas_kernels.latent_decode` computes the same.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

import pallas_kernels
from dsv3_jax.modules.devices import Devices, OneDevice
from dsv3_jax.modules.latent_cache import LatentCache
from dsv3_jax.modules.ordered_sum import ordered_sum
from dsv3_jax.modules.paged_cache import PagedCache

_LOWEST = -1e30  # the maximum before the first logit; finite, so that differences of maxima are never NaN


def attend_to_cache(
    queries: Float[Array, "B T H kv_rank"],
    rope_queries: Float[Array, "B T H rope"],
    cache: LatentCache,
    layer: Int[Array, ""] | int,
    positions: Int[Array, "B T"],
    *,
    first: int,
    scale: float,
    devices: Devices = OneDevice(),
) -> Float[Array, "B T H kv_rank"]:
    """Returns softmax(scale * (q c + q^R k^R)) c over the cached latents c of each query's own sequence.

    Args:
      queries: q^C multiplied by W^UK.
      rope_queries: rotated q^R.
      positions: a query at position p sees entries `first` .. p; one at -1 sees none and gets zeros.
      scale: multiplier of the logits.
      devices: what runs a kernel on the queries' own ranks.

    Returns:
      Weighted sums of latents, in the dtype of `queries`. Logits, maxima and sums are at least float32.
    """
    # No GPU has run the kernel with FP8 entries yet.
    if isinstance(cache, PagedCache) and cache.pages.scale is None:
        pages = cache.pages
        latents, rope_keys = (x.reshape(-1, *x.shape[2:]) for x in (pages.latent, pages.rope_key))
        same = latents.dtype == rope_keys.dtype == queries.dtype
        if same and pallas_kernels.has_decode_kernel(queries, rope_queries, latents):
            # The kernel is given the pages of all layers, since slicing out a layer's would copy them.
            table = cache.table + layer * pages.count
            attend = functools.partial(pallas_kernels.latent_decode, scale=scale, first=first)
            return devices.attend_to_pages(attend, queries, rope_queries, latents, rope_keys, table, positions)
    dtype = queries.dtype
    wide = jnp.promote_types(dtype, jnp.float32)
    batch, _, heads, rank = queries.shape
    # One axis for tokens and heads: XLA's CPU backend then adds in the same order for every number of tokens.
    flat, flat_rope = (x.reshape(batch, -1, x.shape[-1]) for x in (queries, rope_queries))
    position = jnp.repeat(positions, heads, axis=1)[..., None]
    length = cache.block_length

    def add_block(
        block: Int[Array, ""] | int, state: tuple[Array, Array, Array]
    ) -> tuple[Float[Array, "B M"], Float[Array, "B M"], Float[Array, "B M kv_rank"]]:
        maximum, total, gathered = state
        latent, rope_key = lax.optimization_barrier(cache.read(layer, block, dtype))
        logits = jnp.einsum("bmr,bsr->bms", flat, latent, preferred_element_type=wide)
        logits += jnp.einsum("bmc,bsc->bms", flat_rope, rope_key, preferred_element_type=wide)
        at = block * length + jnp.arange(length)
        logits = jnp.where((position >= at) & (at >= first), logits * scale, -jnp.inf)
        raised = jnp.maximum(maximum, jnp.max(logits, axis=-1))
        weights = jnp.exp(logits - raised[..., None])
        shrink = jnp.exp(maximum - raised)
        total = total * shrink + ordered_sum(weights)
        new = lax.dot_general(
            lax.optimization_barrier(weights.astype(dtype)),
            lax.optimization_barrier(latent.transpose(0, 2, 1)),
            (((2,), (2,)), ((0,), (0,))),
            preferred_element_type=wide,
        )
        return raised, total, gathered * shrink[..., None] + lax.optimization_barrier(new)

    rows = flat.shape[:2]
    state = (jnp.full(rows, _LOWEST, wide), jnp.zeros(rows, wide), jnp.zeros((*rows, rank), wide))
    if cache.blocks == 1:
        state = add_block(0, state)
    else:
        needed = jnp.minimum(jnp.max(positions) // length + 1, cache.blocks)
        state = lax.fori_loop(0, needed, add_block, state)
    _, total, gathered = state
    return (gathered / jnp.where(total > 0, total, 1)[..., None]).astype(dtype).reshape(queries.shape)
