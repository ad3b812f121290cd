"""Multi-head Latent Attention (report section 2.1.1, Eq. 1-11).

Queries and key-values pass through low-rank latents; one rotary key is shared by all heads. Training expands keys
and values for every head (640 operations a query, key and head at the 671B model's sizes); decoding instead absorbs
the up-projections W^UK and W^UV into the query and the output, so that it attends to the cached latents themselves
(2,176 operations, but 576 cached numbers a token for all 128 heads together).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.modules.attention_core import causal_attention
from dsv3_jax.modules.latent_cache import LatentCache
from dsv3_jax.modules.linear import Linear
from dsv3_jax.modules.norm import RMSNorm
from dsv3_jax.modules.rope import Rotation, rotate, softmax_scale
from dsv3_jax.precision import Precision
from dsv3_jax.precision.keeping import keep


class LatentAttention(nnx.Module):
    """MLA with its two forms; weights as listed in ARCHITECTURE.md."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, precision: Precision, rngs: nnx.Rngs):
        self.config = config
        self.precision = precision
        heads, d = config.num_attention_heads, config.hidden_size
        make = {"scale": config.initializer_range, "dtype": dtype, "precision": precision, "rngs": rngs}
        query_in = d
        if config.q_lora_rank is not None:
            query_in = config.q_lora_rank
            self.q_a = Linear(config.q_lora_rank, d, **make)
            self.q_a_norm = RMSNorm(config.q_lora_rank, config.latent_norm_eps, dtype=dtype)
        self.q_b = Linear((heads, config.qk_head_dim), query_in, **make)
        self.kv_a = Linear(config.kv_lora_rank + config.qk_rope_head_dim, d, **make)
        self.kv_a_norm = RMSNorm(config.kv_lora_rank, config.latent_norm_eps, dtype=dtype)
        self.kv_b = Linear((heads, config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank, **make)
        self.o = Linear(d, (heads, config.v_head_dim), after_attention=True, **make)

    def __call__(
        self, x: Float[Array, "B T d"], rotation: Rotation, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T d"], Float[Array, "B T kv_rank"], Float[Array, "B T rope"]]:
        """Causal attention over a whole sequence, keys and values expanded.

        Returns:
          The output, and what a cache would hold of this layer: the latents and the rotary keys.
        """
        query, query_rope = self._queries(x, rotation)
        latent, key_rope = self._latents(x, rotation)
        key, value = jnp.split(self.kv_b(latent), [self.config.qk_nope_head_dim], axis=-1)
        shared = jnp.broadcast_to(key_rope[:, :, None, :], (*key.shape[:-1], key_rope.shape[-1]))
        attended = causal_attention(
            jnp.concatenate([query, query_rope], axis=-1),
            jnp.concatenate([key, shared], axis=-1),
            value,
            scale=softmax_scale(self.config),
            segment_ids=segment_ids,
        )
        return keep(self.o(attended)), latent, key_rope

    def decode(
        self,
        x: Float[Array, "B T d"],
        rotation: Rotation,
        cache: LatentCache,
        layer: Int[Array, ""] | int,
        positions: Int[Array, "B T"],
    ) -> tuple[Float[Array, "B T d"], LatentCache]:
        """Attention of new tokens to the cache and to themselves, up-projections absorbed.

        A token at position p sees cache entries 0 .. p of its own sequence; its own entry is written first.
        """
        query, query_rope = self._queries(x, rotation)
        cache = cache.write(layer, positions, *self._latents(x, rotation))
        latent = cache.latent[layer].astype(query.dtype)
        key_rope = cache.rope_key[layer].astype(query.dtype)
        key_up, value_up = jnp.split(self.kv_b.weight[...].astype(query.dtype), [self.config.qk_nope_head_dim], axis=1)

        wide = jnp.promote_types(query.dtype, jnp.float32)
        absorbed = jnp.einsum("bthn,hnr->bthr", query, key_up)
        logits = jnp.einsum("bthr,bsr->bhts", absorbed, latent, preferred_element_type=wide)
        logits += jnp.einsum("bthc,bsc->bhts", query_rope, key_rope, preferred_element_type=wide)
        visible = positions[:, None, :, None] >= jnp.arange(latent.shape[1])
        logits = jnp.where(visible, logits * softmax_scale(self.config), -jnp.inf)
        weights = jax.nn.softmax(logits, axis=-1).astype(query.dtype)
        gathered = jnp.einsum("bhts,bsr->bthr", weights, latent)
        return self.o(jnp.einsum("bthr,hvr->bthv", gathered, value_up)), cache

    def _queries(
        self, x: Float[Array, "B T d"], rotation: Rotation
    ) -> tuple[Float[Array, "B T H nope"], Float[Array, "B T H rope"]]:
        """Eq. 6-9: queries of every head, their rotary part turned."""
        if self.config.q_lora_rank is not None:
            x = self.q_a_norm(keep(self.q_a(x)))
        plain, rope = jnp.split(self.q_b(x), [self.config.qk_nope_head_dim], axis=-1)
        return plain, rotate(rope, rotation)

    def _latents(
        self, x: Float[Array, "B T d"], rotation: Rotation
    ) -> tuple[Float[Array, "B T kv_rank"], Float[Array, "B T rope"]]:
        """Eq. 1 and 3: the normed latent c^KV, and the rotary key k^R, which has no norm and serves all heads."""
        latent, rope = jnp.split(keep(self.kv_a(x)), [self.config.kv_lora_rank], axis=-1)
        return self.kv_a_norm(latent), rotate(rope, rotation)
