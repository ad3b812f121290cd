"""The forward passes that read and write a latent cache: prompts, next tokens, and drafts of the MTP modules."""

from __future__ import annotations

import dataclasses
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
from dsv3_jax.modules.latent_cache import DenseCache, LatentCache
from dsv3_jax.modules.moe import Choice, MixtureOfExperts
from dsv3_jax.modules.multi_token import MultiTokenModule
from dsv3_jax.modules.norm import RMSNorm
from dsv3_jax.modules.rope import make_rotation
from dsv3_jax.precision import Precision
from dsv3_jax.precision.int8_weight import Int8Weight
from dsv3_jax.precision.tiled_weight import TiledWeight

_CachedLayer = Callable[
    [Block, Float[Array, "B T d"], Any, Int[Array, ""], Int[Array, ""]],
    tuple[Float[Array, "B T d"], Any, Choice | None],
]
"""(block, hidden states, cache, its layer in the cache, its layer in its stack) -> (hidden states, cache, choice)."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoded[Cache: LatentCache]:
    """What reading tokens into a cache gives.

    Attributes:
      hidden: hidden states ready for `head`.
      cache: the cache with the tokens' entries.
      load: tokens that chose each expert, of every MoE layer that was run; padding is not counted.
      experts: int32, the experts of each token in every MoE layer that was run; None from `prefill`.
    """

    hidden: Float[Array, "B T d"]
    cache: Cache
    load: Int[Array, "layers E"]
    experts: Int[Array, "layers B T K"] | None


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

    def init_cache(self, batch: int, length: int, dtype: jnp.dtype | None = None, *, mtp: bool = False) -> DenseCache:
        """Returns an empty cache for `batch` sequences of up to `length` tokens.

        Args:
          dtype: of the entries; the recipe's compute dtype unless given.
          mtp: whether the cache has entries for the MTP blocks too.
        """
        config = self.config
        layers = config.num_hidden_layers + (config.num_nextn_predict_layers if mtp else 0)
        return DenseCache.empty(
            layers, batch, length, config.kv_lora_rank, config.qk_rope_head_dim, dtype or self.precision.dtype
        )

    def prefill[Cache: LatentCache](self, tokens: Int[Array, "B T"], cache: Cache) -> Decoded[Cache]:
        """Reads prompts from position 0 with keys and values expanded, and fills the cache.

        Args:
          tokens: int32; rows shorter than T are padded on the right. The entries that padding writes are past the end
            of their row: decoding overwrites each before it reads it.

        Returns:
          Hidden states, and the cache with positions 0 .. T-1 of the main layers written.
        """
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        inputs = BlockInputs(rotation=make_rotation(self.config, positions))

        def layer(
            block: Block, h: Array, cache: Cache, index: Array, index_in_stack: Array
        ) -> tuple[Array, Cache, Choice | None]:
            del index_in_stack
            h, (latent, rope_key), statistics = block.with_latents(h, inputs)
            routing = statistics.routing
            choice = None if routing is None else Choice(routing.load, None)
            return h, cache.write(index, positions, latent, rope_key), choice

        return self._scan_cached_layers(layer, self.embedding(tokens), cache, slice_experts=True)

    def decode[Cache: LatentCache](
        self, tokens: Int[Array, "B T"], cache: Cache, positions: Int[Array, "B T"]
    ) -> Decoded[Cache]:
        """Reads the next tokens of each sequence, which follow its cache, with absorbed up-projections.

        On a CPU in float32 a row's results are the same bits whatever the other rows of the batch are, and whether its
        tokens are read together or one by one.

        Args:
          tokens: int32, T >= 1 new tokens per sequence.
          positions: int32, position of each token in its own sequence; it attends to entries 0 .. position. A position
            of -1 marks padding, which writes nothing.

        Returns:
          Hidden states, and the cache with the new entries.
        """
        if tokens.size == 1 and not self._is_exact_by_row:
            return _first_of(self.decode(_twice(tokens), cache, _twice(positions)))
        rotation = make_rotation(self.config, positions)

        def layer(
            block: Block, h: Array, cache: Cache, index: Array, index_in_stack: Array
        ) -> tuple[Array, Cache, Choice | None]:
            return block.decode(h, rotation, cache, index, positions, expert_layer=index_in_stack)

        return self._scan_cached_layers(layer, self.embedding(tokens), cache, slice_experts=False)

    def draft[Cache: LatentCache](
        self,
        hidden: Float[Array, "B T d"],
        tokens: Int[Array, "B T"],
        cache: Cache,
        positions: Int[Array, "B T"],
        *,
        depth: int = 1,
    ) -> Decoded[Cache]:
        """Runs one MTP module on a cache that was made for the MTP blocks too, for self-speculation.

        The entry for the hidden state of position i is written at position i + depth, that of the token it is joined
        with. Entries up to a position then depend on the tokens up to that position only, as the main layers' do, so
        that sequences with equal beginnings can share them.

        Args:
          hidden: hidden states of depth - 1 at the positions `depth` before (those of `decode` or `prefill` for 1).
          tokens: int32.
          positions: positions of `tokens`; -1 marks padding.

        Returns:
          Hidden states, which predict the token after `tokens`, and the cache.
        """
        if tokens.size == 1 and not self._is_exact_by_row:
            hidden = jnp.repeat(hidden, 2, axis=1)
            return _first_of(self.draft(hidden, _twice(tokens), cache, _twice(positions), depth=depth))
        module = self.mtp[depth - 1]
        layer = self.config.num_hidden_layers + depth - 1
        h = module.join(hidden, self.embedding(tokens), RMSNorm.decode)
        rotation = make_rotation(self.config, positions)
        h, cache, choice = module.block.decode(h, rotation, cache, layer, positions, first=depth)
        assert choice is not None
        choice = jax.tree.map(lambda x: x[None], choice)
        return Decoded(module.output_norm.decode(h), cache, choice.load, choice.experts)

    def next_logits(self, hidden: Float[Array, "B T d"]) -> Float[Array, "B T V"]:
        """Returns the logits; on a CPU a row's are the same bits whatever the number of rows."""
        if hidden.shape[0] * hidden.shape[1] == 1 and not self._is_exact_by_row:
            return self.head(jnp.repeat(hidden, 2, axis=1))[:, :1]
        return self.head(hidden)

    def draft_logits(self, hidden: Float[Array, "B T d"]) -> Float[Array, "B T V"]:
        """Returns the logits of an MTP module's hidden states, from which drafts are drawn."""
        logits = self.head.draft(hidden)
        return self.next_logits(hidden) if logits is None else logits

    @property
    def _is_exact_by_row(self) -> bool:
        """Whether all products of a single row have the bits that they have among other rows."""
        weights = [self.head.exact_weight]
        if self.config.num_moe_layers:
            mixture = self.moe_blocks.feed_forward
            assert isinstance(mixture, MixtureOfExperts)
            weights.append(mixture.router.weight[...])
        return all(isinstance(weight, TiledWeight | Int8Weight) for weight in weights)

    def _scan_cached_layers[Cache: LatentCache](
        self, layer: _CachedLayer, h: Float[Array, "B T d"], cache: Cache, *, slice_experts: bool
    ) -> Decoded[Cache]:
        """Applies `layer` to all main layers in turn; the cache is carried along, so that it is written in place.

        Args:
          slice_experts: whether the scan gives each layer its own experts. Without, every layer is given the stack of
            all layers' experts: slicing one layer out would copy all of its experts, of which few tokens use few.
        """
        config = self.config
        stacks = [self.dense_blocks] if config.num_dense_layers else []
        stacks += [self.moe_blocks] if config.num_moe_layers else []
        carry, first = (h, cache), 0
        chosen = (0, *h.shape[:2], config.num_experts_per_tok)
        choice = Choice(jnp.zeros((0, config.n_routed_experts), jnp.int32), jnp.zeros(chosen, jnp.int32))
        for blocks in stacks:
            unsliced = nnx.Nothing() if slice_experts else nnx.PathContains("experts")
            graph, experts, others = nnx.split(blocks, unsliced, ...)

            def body(
                carry: tuple[Array, Cache],
                item: tuple[Array, nnx.State],
                graph: Any = graph,
                experts: nnx.State = experts,
                first: int = first,
            ) -> tuple[tuple[Array, Cache], Choice | None]:
                index, state = item
                own = jax.tree.map(lambda leaf: leaf, experts)  # Variables that this trace may bind
                block = nnx.merge(graph, own, state)
                h, cache, choice = layer(block, *carry, first + index, index)
                return (h, cache), choice

            layers = _number_of_layers(blocks)
            carry, choices = lax.scan(body, carry, (jnp.arange(layers), others))
            choice = choices or choice
            first += layers
        return Decoded(self.final_norm.decode(carry[0]), carry[1], choice.load, choice.experts)


def _number_of_layers(blocks: Block) -> int:
    return blocks.attention_norm.weight.shape[0]


def _twice(x: Int[Array, "1 1"]) -> Int[Array, "1 2"]:
    """Returns a single token as two equal ones.

    XLA's CPU backend multiplies a single row by another kernel than several rows, which adds in another order.
    """
    return jnp.repeat(x, 2, axis=1)


def _first_of[Cache: LatentCache](twice: Decoded[Cache]) -> Decoded[Cache]:
    experts = None if twice.experts is None else twice.experts[:, :, :1]
    return Decoded(twice.hidden[:, :1], twice.cache, twice.load // 2, experts)
