"""A transformer block: attention and a feed-forward network, each after a norm and with a residual (section 2)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.modules.attention_core import AttentionChoice
from dsv3_jax.modules.balance import Routing
from dsv3_jax.modules.devices import Devices, OneDevice
from dsv3_jax.modules.feed_forward import FeedForward
from dsv3_jax.modules.latent_attention import LatentAttention
from dsv3_jax.modules.latent_cache import LatentCache
from dsv3_jax.modules.moe import Choice, MixtureOfExperts
from dsv3_jax.modules.norm import RMSNorm
from dsv3_jax.modules.rope import Rotation
from dsv3_jax.precision import Precision


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockInputs:
    """The inputs that all blocks of a forward pass share, besides the hidden state.

    Attributes:
      rotation: RoPE angles of the tokens.
      segment_ids: attention stays inside equal ids, when given.
      token_mask: False at tokens that statistics leave out (padding), when given.
      measure_logits: whether the statistics of a layer have the largest logits of its attention.
      attention: what computes attention.
    """

    rotation: Rotation
    segment_ids: Int[Array, "B T"] | None = None
    token_mask: Bool[Array, "B T"] | None = None
    attention: AttentionChoice = dataclasses.field(default="auto", metadata={"static": True})
    measure_logits: bool = dataclasses.field(default=False, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerStatistics:
    """What a layer measures in a forward pass; every field is stacked over layers where there are several.

    Attributes:
      routing: load and balance of its experts; None for a dense layer.
      largest_logits: float32, the largest attention logit of every head, at least 0; None where not asked for.
    """

    routing: Routing | None
    largest_logits: Float[Array, "*layers H"] | None

    @classmethod
    def join(cls, parts: list[LayerStatistics]) -> LayerStatistics:
        """Concatenates statistics that each have a leading layer axis; routing is that of the layers with experts."""
        routing = [part.routing for part in parts if part.routing is not None]
        largest = [part.largest_logits for part in parts if part.largest_logits is not None]
        return cls(Routing.join(routing) if routing else None, jnp.concatenate(largest) if largest else None)


class Block(nnx.Module):
    """One layer, with a dense feed-forward network or a mixture of experts.

    Args:
      moe: whether the layer has a mixture of experts.
      dtype, precision, devices: as for `DeepSeekV3`.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        moe: bool,
        dtype: jnp.dtype,
        precision: Precision,
        devices: Devices = OneDevice(),
        rngs: nnx.Rngs,
    ):
        make: dict[str, Any] = {"dtype": dtype, "precision": precision, "devices": devices, "rngs": rngs}
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.attention = LatentAttention(config, **make)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        if moe:
            self.feed_forward = MixtureOfExperts(config, **make)
        else:
            self.feed_forward = FeedForward(
                config.hidden_size, config.intermediate_size, scale=config.initializer_range, **make
            )

    def __call__(
        self, h: Float[Array, "B T d"], inputs: BlockInputs, experts: Int[Array, "B T K"] | None = None
    ) -> tuple[Float[Array, "B T d"], LayerStatistics]:
        """Maps whole sequences; returns the hidden states and what the layer measures.

        Args:
          experts: the experts of each token, instead of those that the router chooses.
        """
        h, _, statistics = self.with_latents(h, inputs, experts)
        return h, statistics

    def with_latents(
        self, h: Float[Array, "B T d"], inputs: BlockInputs, experts: Int[Array, "B T K"] | None = None
    ) -> tuple[Float[Array, "B T d"], tuple[Float[Array, "B T kv_rank"], Float[Array, "B T rope"]], LayerStatistics]:
        """Maps whole sequences, and also returns what a cache would hold of them: c^KV and k^R."""
        with jax.named_scope("attention"):
            u, h = self.attention_norm.beside_residual(h, self.attention.kv_a)
            attended, latent, rope_key, largest = self.attention(
                u,
                inputs.rotation,
                inputs.segment_ids,
                choice=inputs.attention,
                token_mask=inputs.token_mask,
                measure_logits=inputs.measure_logits,
            )
        h, routing = self._feed_forward(h + attended, inputs.token_mask, experts)
        return h, (latent, rope_key), LayerStatistics(routing, largest)

    def decode[Cache: LatentCache](
        self,
        h: Float[Array, "B T d"],
        rotation: Rotation,
        cache: Cache,
        layer: Int[Array, ""] | int,
        positions: Int[Array, "B T"],
        *,
        first: int = 0,
        expert_layer: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T d"], Cache, Choice | None]:
        """Maps new tokens that follow a cache (see `LatentAttention.decode` and `MixtureOfExperts.decode`).

        Returns:
          The hidden states, the cache, and the experts that the tokens chose (None in a dense block).
        """
        h, cache = self.decode_attention(h, rotation, cache, layer, positions, first=first)
        h, choice = self.decode_feed_forward(h, positions, expert_layer)
        return h, cache, choice

    def decode_attention[Cache: LatentCache](
        self,
        h: Float[Array, "B T d"],
        rotation: Rotation,
        cache: Cache,
        layer: Int[Array, ""] | int,
        positions: Int[Array, "B T"],
        *,
        first: int = 0,
    ) -> tuple[Float[Array, "B T d"], Cache]:
        """Maps new tokens by the first half of the block."""
        with jax.named_scope("attention"):
            normed = self.attention_norm.decode(h)
            attended, cache = self.attention.decode(normed, rotation, cache, layer, positions, first)
        return h + attended, cache

    def decode_feed_forward(
        self, h: Float[Array, "B T d"], positions: Int[Array, "B T"], expert_layer: Int[Array, ""] | None
    ) -> tuple[Float[Array, "B T d"], Choice | None]:
        """Maps new tokens by the second half of the block."""
        with jax.named_scope("feed_forward"):
            u = self.feed_forward_norm.decode(h)
            if isinstance(self.feed_forward, MixtureOfExperts):
                y, choice = self.feed_forward.decode(u, positions >= 0, expert_layer)
                return h + y, choice
            return h + self.feed_forward(u), None

    def _feed_forward(
        self, h: Float[Array, "B T d"], token_mask: Bool[Array, "B T"] | None, experts: Int[Array, "B T K"] | None
    ) -> tuple[Float[Array, "B T d"], Routing | None]:
        with jax.named_scope("feed_forward"):
            if not isinstance(self.feed_forward, MixtureOfExperts):
                u, h = self.feed_forward_norm.beside_residual(h, self.feed_forward.gate_up)
                return h + self.feed_forward(u), None
            if self.feed_forward.has_shared_experts:
                shared = self.feed_forward.shared.gate_up
                u, h = self.feed_forward_norm.beside_residual(h, shared, with_rows=True)
            else:
                u = self.feed_forward_norm(h)
            y, routing = self.feed_forward(u, token_mask, experts)
            return h + y, routing
