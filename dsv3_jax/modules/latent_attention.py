"""Multi-head Latent Attention (report section 2.1.1, Eq. 1-11).

    c^KV = W^DKV h                  (1)      k^C = W^UK c^KV     (2)      k^R = RoPE(W^KR h)         (3)
    k_i = [k^C_i; k^R]              (4)      v^C = W^UV c^KV     (5)
    c^Q = W^DQ h                    (6)      q^C = W^UQ c^Q      (7)      q^R = RoPE(W^QR c^Q)       (8)
    q_i = [q^C_i; q^R_i]            (9)
    o_i = softmax_j(q_i k_i^T / sqrt(d_h + d_h^R)) v^C_i         (10)     u = W^O [o_1; ...; o_{n_h}]    (11)

The weights are named as in published checkpoints: `kv_a` holds W^DKV and W^KR, `kv_b` W^UK and W^UV, `q_a` W^DQ, `q_b`
W^UQ and W^QR, `o` W^O; both latents pass an RMSNorm before their up-projection. YaRN's factor of the softmax scale is
in `dsv3_jax.modules.rope.softmax_scale`.

Training expands keys and values for every head, which takes 640 operations per query, key and head at the 671B model's
sizes. Decoding instead absorbs the up-projections W^UK and W^UV into the query and the output, so that it attends to
the cached latents themselves: 2,176 operations, but 576 cached numbers per token for all 128 heads together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.modules.attention_core import AttentionChoice, CoreAttention, largest_logits
from dsv3_jax.modules.cached_attention import attend_to_cache
from dsv3_jax.modules.devices import Devices, OneDevice
from dsv3_jax.modules.latent_cache import LatentCache
from dsv3_jax.modules.linear import Linear
from dsv3_jax.modules.norm import RMSNorm
from dsv3_jax.modules.rope import Rotation, rotate, softmax_scale
from dsv3_jax.precision import KeptOutput, Precision, QuantizedRows, rounded_weight
from dsv3_jax.precision.keeping import keep
from dsv3_jax.precision.tiled_weight import AbsorbedWeight, TiledWeight

_OfHeads = Callable[[Float[Array, "B T H in"]], Float[Array, "B T H out"]]


class LatentAttention(nnx.Module):
    """MLA in its two forms: expanded (`__call__`) and absorbed (`decode`)."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: jnp.dtype,
        precision: Precision,
        devices: Devices = OneDevice(),
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.precision, self.devices = precision, devices
        heads, d = config.num_attention_heads, config.hidden_size
        make: dict[str, Any] = {"scale": config.initializer_range, "dtype": dtype, "precision": precision}
        make |= {"devices": devices, "rngs": rngs}
        query_in = d
        if config.q_lora_rank is not None:
            query_in = config.q_lora_rank
            self.q_a = Linear(config.q_lora_rank, d, ("latent", "embed"), **make)
            self.q_a_norm = RMSNorm(config.q_lora_rank, config.latent_norm_eps, dtype=dtype)
        # Latents are narrow: FSDP shards the input side of their up-projections.
        up = ("heads", None, "embed")
        self.q_b = Linear((heads, config.qk_head_dim), query_in, up, **make)
        self.kv_a = Linear(config.kv_lora_rank + config.qk_rope_head_dim, d, ("latent", "embed"), **make)
        self.kv_a_norm = RMSNorm(config.kv_lora_rank, config.latent_norm_eps, dtype=dtype)
        self.kv_b = Linear((heads, config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank, up, **make)
        self.o = Linear(d, (heads, config.v_head_dim), ("embed", "wide", None), after_attention=True, **make)

    def __call__(
        self,
        x: Float[Array, "B T d"] | QuantizedRows,
        rotation: Rotation,
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        choice: AttentionChoice = "auto",
        token_mask: Bool[Array, "B T"] | None = None,
        measure_logits: bool = False,
    ) -> tuple[Float[Array, "B T d"], Float[Array, "B T kv_rank"], Float[Array, "B T rope"], Float[Array, " H"] | None]:
        """Computes causal attention over a whole sequence, keys and values expanded.

        Args:
          segment_ids: when given, positions attend only within equal ids.
          choice: what computes it.
          token_mask: False at tokens whose queries do not count in the largest logits; all count unless given.
          measure_logits: whether to return the largest logit of every head.

        Returns:
          The output u, what a cache would hold of this layer (the normed latents c^KV and the rotary keys k^R), and
          the largest logit of every head, at least 0, which has no gradient; None unless asked for.
        """
        query, query_rope = self._queries(x, rotation, functools.partial(RMSNorm.before_linear, linear=self.q_b))
        latent, key_rope = self._latents(x, rotation, RMSNorm.__call__)
        key, value = jnp.split(self.kv_b(latent), [self.config.qk_nope_head_dim], axis=-1)
        query, scale, largest = jnp.concatenate([query, query_rope], axis=-1), softmax_scale(self.config), None
        with jax.named_scope("attention_core"):
            attention = CoreAttention(scale, choice, KeptOutput.of(self.precision, self.config.v_head_dim))
            attended = self.devices.attend(attention, query, key, value, key_rope, segment_ids)
            if measure_logits:
                inputs = map(lax.stop_gradient, (query, key, key_rope))
                largest = largest_logits(*inputs, scale=scale, segment_ids=segment_ids, counted=token_mask)
        return keep(self.o(attended)), latent, key_rope, largest

    def decode[Cache: LatentCache](
        self,
        x: Float[Array, "B T d"],
        rotation: Rotation,
        cache: Cache,
        layer: Int[Array, ""] | int,
        positions: Int[Array, "B T"],
        first: int = 0,
    ) -> tuple[Float[Array, "B T d"], Cache]:
        """Computes attention of new tokens to the cache and to themselves, with the up-projections absorbed.

        A token at position p sees cache entries `first` .. p of its own sequence; its own entry is written first.

        Args:
          layer: index of this layer in the cache.
          positions: int32, position of each token in its own sequence; -1 for padding, which writes nothing.

        Returns:
          The output, and the cache with the new entries.
        """
        query, query_rope = self._queries(x, rotation, RMSNorm.decode)
        cache = cache.write(layer, positions, *self._latents(x, rotation, RMSNorm.decode))
        key_up, value_up = self._absorbed()
        with jax.named_scope("attention_core"):
            gathered = attend_to_cache(
                key_up(query),
                query_rope,
                cache,
                layer,
                positions,
                first=first,
                scale=softmax_scale(self.config),
                devices=self.devices,
            )
        return self.o(value_up(gathered)), cache

    def _absorbed(self) -> tuple[_OfHeads, _OfHeads]:
        """Returns what multiplies queries [B, T, H, nope] by W^UK, and sums of latents [B, T, H, kv_rank] by W^UV."""
        weight = self.kv_b.weight[...]
        if isinstance(weight, AbsorbedWeight):
            return functools.partial(_by_tiles, weight.key), functools.partial(_by_tiles, weight.value)
        kv_up = rounded_weight(weight, self.precision)
        key_up, value_up = jnp.split(kv_up, [self.config.qk_nope_head_dim], axis=1)
        # Transposed, because XLA's CPU backend adds in another order for few tokens where r is last in both operands.
        value_up = lax.optimization_barrier(value_up.transpose(0, 2, 1))
        return functools.partial(_by_head, weight=key_up), functools.partial(_by_head, weight=value_up)

    def _queries(
        self, x: Float[Array, "B T d"] | QuantizedRows, rotation: Rotation, norm: Callable[[RMSNorm, Array], Any]
    ) -> tuple[Float[Array, "B T H nope"], Float[Array, "B T H rope"]]:
        """Returns q^C and q^R of every head (Eq. 6-8)."""
        if self.config.q_lora_rank is not None:
            x = norm(self.q_a_norm, keep(self.q_a(x)))
        plain, rope = jnp.split(self.q_b(x), [self.config.qk_nope_head_dim], axis=-1)
        return plain, rotate(rope, rotation)

    def _latents(
        self, x: Float[Array, "B T d"] | QuantizedRows, rotation: Rotation, norm: Callable[[RMSNorm, Array], Array]
    ) -> tuple[Float[Array, "B T kv_rank"], Float[Array, "B T rope"]]:
        """Returns the normed latent c^KV and the rotary key k^R, which has no norm and serves all heads (Eq. 1, 3)."""
        latent, rope = jnp.split(keep(self.kv_a(x)), [self.config.kv_lora_rank], axis=-1)
        return norm(self.kv_a_norm, latent), rotate(rope, rotation)


def _by_head(x: Float[Array, "B T H in"], weight: Float[Array, "H in out"]) -> Float[Array, "B T H out"]:
    """Returns each head's product; that of a single token from two equal ones, as XLA adds in another order for one."""
    rows = jnp.repeat(x, 2, axis=1) if x.shape[0] * x.shape[1] == 1 else x
    return jnp.einsum("bthi,hio->btho", rows, weight)[:, : x.shape[1]]


def _by_tiles(weight: TiledWeight, x: Float[Array, "B T H in"]) -> Float[Array, "B T H out"]:
    """Returns each head's product."""
    rows = jnp.moveaxis(x, 2, 0).reshape(x.shape[2], -1, x.shape[3])
    y = weight.product(rows, x.dtype)
    return jnp.moveaxis(y.reshape(x.shape[2], *x.shape[:2], -1), 0, 2)
