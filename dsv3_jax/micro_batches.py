"""Reading a batch as two micro-batches, for devices that exchange tokens of experts (report section 3.4.1).

In one iteration of the compiled loop the first micro-batch passes a layer, and the second passes the feed-forward
network of that layer and the attention of the next. Nothing that is computed or sent for one depends on what is sent
for the other, so that the compiler may overlap them:

    first     attention of l   dispatch l   experts l   combine l
    second    dispatch l       experts l    combine l   attention of l + 1
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from dsv3_jax.decoding import CachedDecoding, Decoded
from dsv3_jax.modules.block import Block
from dsv3_jax.modules.moe import Choice
from dsv3_jax.modules.paged_cache import PagedCache, Pages
from dsv3_jax.modules.rope import Rotation, make_rotation


@dataclasses.dataclass(frozen=True)
class _MicroBatch:
    """What one micro-batch is besides its hidden states."""

    name: str
    positions: Int[Array, "b T"]
    rotation: Rotation
    table: Int[Array, "b N"]

    def attention(
        self, block: Block, h: Float[Array, "b T d"], pages: Pages, layer: Int[Array, ""] | int
    ) -> tuple[Float[Array, "b T d"], Pages]:
        with jax.named_scope(self.name):
            cache = PagedCache(pages, self.table)
            h, cache = block.decode_attention(h, self.rotation, cache, layer, self.positions)
            return h, cache.pages

    def feed_forward(
        self, block: Block, h: Float[Array, "b T d"], expert_layer: Int[Array, ""] | int
    ) -> tuple[Float[Array, "b T d"], Choice | None]:
        with jax.named_scope(self.name):
            return block.decode_feed_forward(h, self.positions, jnp.asarray(expert_layer))


def decode_in_two(
    model: CachedDecoding, tokens: Int[Array, "B T"], cache: PagedCache, positions: Int[Array, "B T"]
) -> Decoded[PagedCache]:
    """Returns what `model.decode` returns for an even number of sequences, of which each half is a micro-batch."""
    half = len(tokens) // 2
    first, second = (
        _MicroBatch(name, own, make_rotation(model.config, own), table)
        for name, own, table in (
            ("micro_batch_1", positions[:half], cache.table[:half]),
            ("micro_batch_2", positions[half:], cache.table[half:]),
        )
    )
    state = _State(model.embedding(tokens[:half]), model.embedding(tokens[half:]), cache.pages)
    chosen = (0, *tokens.shape, model.config.num_experts_per_tok)
    choice = Choice(jnp.zeros((0, model.config.n_routed_experts), jnp.int32), jnp.zeros(chosen, jnp.int32))
    below = 0
    if model.config.num_dense_layers:
        state, _ = _through(model.dense_blocks, state, first, second, below)
        below = model.config.num_dense_layers
    if model.config.num_moe_layers:
        state, found = _through(model.moe_blocks, state, first, second, below)
        choice = found or choice
    hidden = model.final_norm.decode(jnp.concatenate([state.first, state.second]))
    return Decoded(hidden, dataclasses.replace(cache, pages=state.pages), choice.load, choice.experts)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """The hidden states of both micro-batches, and the cache."""

    first: Float[Array, "b T d"]
    second: Float[Array, "b T d"]
    pages: Pages


def _through(
    blocks: Block, state: _State, first: _MicroBatch, second: _MicroBatch, below: int
) -> tuple[_State, Choice | None]:
    """Applies stacked blocks to both micro-batches.

    Args:
      below: number of layers of the model before these.

    Returns:
      The new state, and the experts that the tokens of both chose in every layer, if the blocks have experts.
    """
    graph, experts, others = nnx.split(blocks, nnx.PathContains("experts"), ...)
    layers = jax.tree.leaves(others)[0].shape[0]

    def block_of(layer: Int[Array, ""] | int) -> Block:
        """Returns a layer with its own weights but for the experts, which are those of all layers."""
        own = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, layer, keepdims=False), others)
        return nnx.merge(graph, jax.tree.map(lambda leaf: leaf, experts), own)

    def layer(state: _State, index: Int[Array, ""] | int, *, last: bool) -> tuple[_State, Choice | None]:
        """Applies a layer, to the second micro-batch without its attention but, unless `last`, with the next one's."""
        block = block_of(index)
        h, pages = first.attention(block, state.first, state.pages, below + index)
        h, choice = first.feed_forward(block, h, index)
        other, other_choice = second.feed_forward(block, state.second, index)
        if not last:
            other, pages = second.attention(block_of(index + 1), other, pages, below + index + 1)
        return _State(h, other, pages), _joined(choice, other_choice)

    other, pages = second.attention(block_of(0), state.second, state.pages, below)
    state = dataclasses.replace(state, second=other, pages=pages)

    def body(state: _State, index: Int[Array, ""]) -> tuple[_State, Choice | None]:
        return layer(state, index, last=False)

    state, choices = lax.scan(body, state, jnp.arange(layers - 1))
    state, choice = layer(state, layers - 1, last=True)
    if choice is None:
        return state, None
    return state, jax.tree.map(lambda many, one: jnp.concatenate([many, one[None]]), choices, choice)


def _joined(first: Choice | None, second: Choice | None) -> Choice | None:
    if first is None or second is None:
        return None
    assert first.experts is not None
    assert second.experts is not None
    return Choice(first.load + second.load, jnp.concatenate([first.experts, second.experts]))
