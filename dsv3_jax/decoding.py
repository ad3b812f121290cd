"""The forward passes that read and write a latent cache: prompts, next tokens, and drafts of the MTP modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.modules.block import Block, BlockInputs
from dsv3_jax.modules.embedding import Embedding, Head
from dsv3_jax.modules.latent_cache import LatentCache
from dsv3_jax.modules.multi_token import MultiTokenModule
from dsv3_jax.modules.norm import RMSNorm
from dsv3_jax.modules.rope import make_rotation
from dsv3_jax.precision import Precision

_CachedLayer = Callable[
    [Block, Float[Array, "B T d"], LatentCache, Int[Array, ""], Int[Array, ""]],
    tuple[Float[Array, "B T d"], LatentCache],
]
"""(block, hidden states, cache, its layer in the cache, its layer in its stack) -> (hidden states, cache)."""


class CachedDecoding(nnx.Module):
    """The part of `DeepSeekV3` that decodes. It has no parameters of its own."""

    config: ModelConfig
    precision: Precision
    embedding: Embedding
    dense_blocks: Block
    moe_blocks: Block
    final_norm: RMSNorm
    head: Head
    mtp: nnx.List[MultiTokenModule]

    def init_cache(self, batch: int, length: int, dtype: jnp.dtype | None = None, *, mtp: bool = False) -> LatentCache:
        """Returns an empty cache for `batch` sequences of up to `length` tokens.

        Args:
          dtype: of the entries; the recipe's compute dtype unless given.
          mtp: whether the cache has entries for the MTP blocks too.
        """
        config = self.config
        layers = config.num_hidden_layers + (config.num_nextn_predict_layers if mtp else 0)
        return LatentCache.empty(
            layers, batch, length, config.kv_lora_rank, config.qk_rope_head_dim, dtype or self.precision.dtype
        )

    def prefill(self, tokens: Int[Array, "B T"], cache: LatentCache) -> tuple[Float[Array, "B T d"], LatentCache]:
        """Reads prompts from position 0 with keys and values expanded, and fills the cache.

        Args:
          tokens: int32; rows shorter than T are padded on the right. The entries that padding writes are past the end
            of their row: decoding overwrites each before it reads it.

        Returns:
          Hidden states ready for `head`, and the cache with positions 0 .. T-1 of the main layers written.
        """
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        inputs = BlockInputs(rotation=make_rotation(self.config, positions))

        def layer(
            block: Block, h: Array, cache: LatentCache, index: Array, index_in_stack: Array
        ) -> tuple[Array, LatentCache]:
            del index_in_stack
            h, (latent, rope_key), _routing = block.with_latents(h, inputs)
            return h, cache.write(index, positions, latent, rope_key)

        h, cache = self._scan_cached_layers(layer, self.embedding(tokens), cache, slice_experts=True)
        return self.final_norm(h), cache

    def decode(
        self, tokens: Int[Array, "B T"], cache: LatentCache, positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T d"], LatentCache]:
        """Reads the next tokens of each sequence, which follow its cache, with absorbed up-projections.

        Args:
          tokens: int32, T >= 1 new tokens per sequence.
          positions: int32, position of each token in its own sequence; it attends to entries 0 .. position.

        Returns:
          Hidden states ready for `head`, and the cache with the new entries.
        """
        rotation = make_rotation(self.config, positions)

        def layer(
            block: Block, h: Array, cache: LatentCache, index: Array, index_in_stack: Array
        ) -> tuple[Array, LatentCache]:
            return block.decode(h, rotation, cache, index, positions, expert_layer=index_in_stack)

        h, cache = self._scan_cached_layers(layer, self.embedding(tokens), cache, slice_experts=False)
        return self.final_norm(h), cache

    def draft(
        self,
        hidden: Float[Array, "B T d"],
        tokens: Int[Array, "B T"],
        cache: LatentCache,
        positions: Int[Array, "B T"],
        *,
        depth: int = 1,
    ) -> tuple[Float[Array, "B T d"], LatentCache]:
        """Runs one MTP module on a cache that was made with `mtp=True`, for self-speculation.

        Args:
          hidden: hidden states of depth - 1 at `positions` (those of `decode` or `prefill` for depth 1).
          tokens: int32, the token `depth` positions after each position.
          positions: as in `decode`.

        Returns:
          Hidden states ready for `head`, which predict the token after `tokens`, and the cache.
        """
        module = self.mtp[depth - 1]
        layer = self.config.num_hidden_layers + depth - 1
        rotation = make_rotation(self.config, positions)
        h = module.join(hidden, self.embedding(tokens))
        h, cache = module.block.decode(h, rotation, cache, layer, positions)
        return module.output_norm(h), cache

    def _scan_cached_layers(
        self, layer: _CachedLayer, h: Float[Array, "B T d"], cache: LatentCache, *, slice_experts: bool
    ) -> tuple[Float[Array, "B T d"], LatentCache]:
        """Applies `layer` to all main layers in turn; the cache is carried along, so that it is written in place.

        Args:
          slice_experts: whether the scan gives each layer its own experts. Without, every layer is given the stack of
            all layers' experts: slicing one layer out would copy all of its experts, of which few tokens use few.
        """
        config = self.config
        stacks = [self.dense_blocks] if config.num_dense_layers else []
        stacks += [self.moe_blocks] if config.num_moe_layers else []
        carry, first = (h, cache), 0
        for blocks in stacks:
            unsliced = nnx.Nothing() if slice_experts else nnx.PathContains("experts")
            graph, experts, others = nnx.split(blocks, unsliced, ...)

            def body(
                carry: tuple[Array, LatentCache],
                item: tuple[Array, nnx.State],
                graph: Any = graph,
                experts: nnx.State = experts,
                first: int = first,
            ) -> tuple[tuple[Array, LatentCache], None]:
                index, state = item
                own = jax.tree.map(lambda leaf: leaf, experts)  # Variables that this trace may bind
                block = nnx.merge(graph, own, state)
                return layer(block, *carry, first + index, index), None

            layers = _number_of_layers(blocks)
            carry, _ = lax.scan(body, carry, (jnp.arange(layers), others))
            first += layers
        return carry


def _number_of_layers(blocks: Block) -> int:
    return blocks.attention_norm.weight.shape[0]
