"""DeepSeek-V3: embedding, dense blocks, MoE blocks, norm, head, and the multi-token prediction chain (section 2).

Homogeneous layers are stacked and scanned, so that a 61-layer model is traced and compiled as one dense and one MoE
block. The module holds parameters; every method is a pure function of them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.modules.block import Block, BlockInputs
from dsv3_jax.modules.latent_cache import LatentCache
from dsv3_jax.modules.linear import normal
from dsv3_jax.modules.moe import MixtureOfExperts
from dsv3_jax.modules.multi_token import MultiTokenModule
from dsv3_jax.modules.norm import RMSNorm
from dsv3_jax.modules.rematerialisation import rematerialise
from dsv3_jax.modules.rope import make_rotation
from dsv3_jax.modules.router import RouterBias
from dsv3_jax.modules.routing_statistics import Routing
from dsv3_jax.precision import PRECISIONS, Precision

_Carry = tuple[Float[Array, "B T d"], LatentCache]

_MOST_UNROLLED_LAYERS = 8  # every unrolled layer is compiled anew


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Features:
    """Hidden states ready for the output head.

    Attributes:
      hidden: main model, after the final norm.
      mtp_hidden: one array a depth k = 1..D, after the module's output norm; position i predicts token i+k+1.
      routing: statistics of the MoE layers, the MTP blocks' last; None for a model without MoE layers.
    """

    hidden: Float[Array, "B T d"]
    mtp_hidden: tuple[Float[Array, "B Tk d"], ...]
    routing: Routing | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelOutput:
    """Logits of the main head, [B, T, V], and of each MTP depth k, [B, T-k, V]; routing as in Features."""

    logits: Float[Array, "B T V"]
    mtp_logits: tuple[Float[Array, "B Tk V"], ...]
    routing: Routing | None


class Embedding(nnx.Module):
    """Token embedding, shared by the main model and the MTP modules."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, precision: Precision, rngs: nnx.Rngs):
        shape = (config.vocab_size, config.hidden_size)
        self.precision = precision
        self.lookup: Any = None  # what finds the rows of a table that lies on several devices
        self.weight = nnx.Param(normal(rngs, shape, config.initializer_range, dtype))

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T d"]:
        if self.lookup is not None:
            return self.lookup(self.weight[...], tokens, self.precision.dtype)
        return self.weight[...][tokens].astype(self.precision.dtype)


class Head(nnx.Module):
    """Output head, shared by the main model and the MTP modules. Logits are float32 in every recipe."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, precision: Precision, rngs: nnx.Rngs):
        shape = (config.vocab_size, config.hidden_size)
        self.precision = precision
        self.on_ranks: Any = None  # as in `Linear`
        self.weight = nnx.Param(normal(rngs, shape, config.initializer_range, dtype))

    def __call__(self, hidden: Float[Array, "*batch d"]) -> Float[Array, "*batch V"]:
        if self.on_ranks is None:
            return self._logits(hidden, self.weight[...])
        axes = {"batch_axes": hidden.ndim - 1, "in_axes": 1}
        return self.on_ranks(self._logits, hidden, self.weight[...], dtype=self.precision.dtype, **axes)

    def _logits(self, hidden: Float[Array, "*batch d"], weight: Float[Array, "V d"]) -> Float[Array, "*batch V"]:
        dtype = self.precision.dtype
        return lax.dot_general(
            hidden.astype(dtype),
            weight.astype(dtype),
            (((hidden.ndim - 1,), (1,)), ((), ())),
            preferred_element_type=jnp.promote_types(dtype, jnp.float32),
        )


class DeepSeekV3(nnx.Module):
    """The model.

    Args:
      config: the architecture.
      rngs: random keys of the initial weights (stream `params`).
      precision: recipe of the computation; float32 unless given.
      param_dtype: dtype the parameters are stored in (router biases are float32 always).
      remat: name of a rematerialisation policy (`dsv3_jax.modules.rematerialisation`).
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        precision: Precision = PRECISIONS["float32"],
        param_dtype: jnp.dtype = jnp.float32,
        remat: str = "none",
    ):
        rematerialise(lambda: None, remat)  # an unknown name is said here, not at the first step
        self.config = config
        self.precision = precision
        self.remat = remat
        dtype = jnp.dtype(param_dtype)
        make: dict[str, Any] = {"dtype": dtype, "precision": precision}
        self.embedding = Embedding(config, rngs=rngs, **make)
        if config.num_dense_layers:
            self.dense_blocks = _stack(config, config.num_dense_layers, moe=False, rngs=rngs, **make)
        if config.num_moe_layers:
            self.moe_blocks = _stack(config, config.num_moe_layers, moe=True, rngs=rngs, **make)
        self.final_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.head = Head(config, rngs=rngs, **make)
        self.mtp = nnx.List(
            [MultiTokenModule(config, rngs=rngs, **make) for _ in range(config.num_nextn_predict_layers)]
        )

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> ModelOutput:
        """Logits of every position; arguments as in `features`."""
        features = self.features(tokens, positions=positions, segment_ids=segment_ids)
        return ModelOutput(
            logits=self.head(features.hidden),
            mtp_logits=tuple(self.head(hidden) for hidden in features.mtp_hidden),
            routing=features.routing,
        )

    def features(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        isolate_segments: bool = True,
    ) -> Features:
        """Hidden states before the output head, for losses that never hold all logits.

        Args:
          tokens: int32.
          positions: RoPE positions; 0 .. T-1 unless given. The causal mask is by place, not by position.
          segment_ids: int32; 0 marks padding, which routing statistics leave out.
          isolate_segments: attention stays inside equal segment ids; with False the ids mark padding only
            (the report packs documents without a mask between them).
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        inputs = self.block_inputs(positions, segment_ids, isolate_segments=isolate_segments)
        embedded = self.embedding(tokens)
        stream, routing = self._main_blocks(embedded, inputs)
        hidden = self.final_norm(stream)
        mtp_hidden, mtp_routing = self.multi_token(stream, hidden, embedded, inputs)
        parts = [routing] if routing is not None else []
        parts += mtp_routing
        return Features(hidden, mtp_hidden, Routing.join(parts) if parts else None)

    def block_inputs(
        self, positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None, *, isolate_segments: bool
    ) -> BlockInputs:
        """What every block is given beside the hidden state; arguments as in `features`."""
        return BlockInputs(
            rotation=make_rotation(self.config, positions),
            segment_ids=segment_ids if isolate_segments else None,
            token_mask=None if segment_ids is None else segment_ids != 0,
        )

    def _main_blocks(
        self, h: Float[Array, "B T d"], inputs: BlockInputs
    ) -> tuple[Float[Array, "B T d"], Routing | None]:
        """All layers of the main model; the residual stream and the stacked routing statistics."""
        routing = None
        if self.config.num_dense_layers:
            h, _ = self.scan_blocks(self.dense_blocks, h, inputs)
        if self.config.num_moe_layers:
            h, routing = self.scan_blocks(self.moe_blocks, h, inputs)
        return h, routing

    def scan_blocks(
        self, blocks: Block, h: Float[Array, "B T d"], inputs: BlockInputs
    ) -> tuple[Float[Array, "B T d"], Routing | None]:
        """Stacked blocks, one after the other."""
        graph, stacked = nnx.split(blocks)

        def layer(h: Float[Array, "B T d"], state: nnx.State) -> tuple[Float[Array, "B T d"], Routing | None]:
            return nnx.merge(graph, state)(h, inputs)

        return lax.scan(rematerialise(layer, self.remat), h, stacked, unroll=self._unroll(stacked))

    def _unroll(self, stacked: nnx.State) -> int:
        """How many layers lie side by side in the compiled program.

        A loop copies what it keeps for the backward pass into stacked buffers, which it first fills with zeros: a
        seventh of a small model's step. Few layers are therefore laid out whole. With rematerialisation they stay a
        loop, which is what keeps a recomputation from being merged with the first computation.
        """
        layers = jax.tree.leaves(stacked)[0].shape[0]
        return layers if self.remat == "none" and layers <= _MOST_UNROLLED_LAYERS else 1

    def multi_token(
        self,
        stream: Float[Array, "B T d"],
        hidden: Float[Array, "B T d"],
        embedded: Float[Array, "B T d"],
        inputs: BlockInputs,
    ) -> tuple[tuple[Float[Array, "B Tk d"], ...], list[Routing]]:
        """The chain of MTP modules over the embeddings of the main pass.

        Depth k has T-k positions. It runs on all T, so that shapes stay round; the last k, which see embeddings
        from the wrong end, are kept out of the statistics and cut off (causality keeps them from the others).
        """
        previous = hidden if self.config.mtp_hidden_after_final_norm else stream
        length = embedded.shape[1]
        results, statistics = [], []
        for k, module in enumerate(self.mtp, start=1):
            shifted = jnp.roll(embedded, -k, axis=1)
            inside = jnp.broadcast_to(jnp.arange(length) < length - k, embedded.shape[:2])
            mask = inside if inputs.token_mask is None else inside & inputs.token_mask
            block_inputs = dataclasses.replace(inputs, token_mask=mask)
            graph, state = nnx.split(module.block)

            def block(
                h: Float[Array, "B T d"], state: nnx.State, inputs: BlockInputs, graph: Any = graph
            ) -> tuple[Float[Array, "B T d"], Routing | None]:
                return nnx.merge(graph, state)(h, inputs)

            out, routing = rematerialise(block, self.remat)(module.join(previous, shifted), state, block_inputs)
            normed = module.output_norm(out)
            previous = normed if self.config.mtp_hidden_after_final_norm else out
            results.append(normed[:, : length - k])
            statistics.append(jax.tree.map(lambda leaf: leaf[None], routing))
        return tuple(results), statistics

    # Decoding ------------------------------------------------------------------------------------------------

    def init_cache(self, batch: int, length: int, dtype: jnp.dtype | None = None, *, mtp: bool = False) -> LatentCache:
        """An empty cache for `batch` sequences of up to `length` tokens; with `mtp`, room for the MTP blocks too."""
        config = self.config
        layers = config.num_hidden_layers + (config.num_nextn_predict_layers if mtp else 0)
        return LatentCache.empty(
            layers, batch, length, config.kv_lora_rank, config.qk_rope_head_dim, dtype or self.precision.dtype
        )

    def prefill(self, tokens: Int[Array, "B T"], cache: LatentCache) -> tuple[Float[Array, "B T d"], LatentCache]:
        """Reads prompts from position 0 with keys and values expanded, filling the cache.

        Returns:
          Hidden states ready for `head`, and the cache with positions 0 .. T-1 of the main layers written. Rows
          shorter than T are padded on the right: what the padding leaves in the cache lies beyond the row's own
          positions, where decoding does not look before it has written there.
        """
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        inputs = BlockInputs(rotation=make_rotation(self.config, positions))

        def layer(
            carry: tuple[Float[Array, "B T d"], LatentCache],
            index_and_state: tuple[Array, nnx.State],
            graph: Any,
        ) -> tuple[tuple[Float[Array, "B T d"], LatentCache], None]:
            h, cache = carry
            index, state = index_and_state
            h, (latent, rope_key), _ = nnx.merge(graph, state).with_latents(h, inputs)
            return (h, cache.write(index, positions, latent, rope_key)), None

        h, cache = self._scan_cached(layer, self.embedding(tokens), cache)
        return self.final_norm(h), cache

    def decode(
        self, tokens: Int[Array, "B T"], cache: LatentCache, positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T d"], LatentCache]:
        """Reads the next tokens of each sequence behind its cache, in the absorbed form.

        Args:
          tokens: int32, T >= 1 new tokens a sequence.
          positions: place of each token in its own sequence; it attends to entries 0 .. position.

        Returns:
          Hidden states ready for `head`, and the cache with the new entries.
        """
        rotation = make_rotation(self.config, positions)
        dense = self.config.num_dense_layers
        carry = (self.embedding(tokens), cache)
        if dense:
            graph, stacked = nnx.split(self.dense_blocks)

            def dense_layer(carry: _Carry, index_and_state: tuple[Array, nnx.State]) -> tuple[_Carry, None]:
                index, state = index_and_state
                return nnx.merge(graph, state).decode(carry[0], rotation, carry[1], index, positions), None

            carry, _ = lax.scan(dense_layer, carry, (jnp.arange(dense), stacked))
        if self.config.num_moe_layers:
            # The experts stay whole: slicing a layer out would copy all of them to use a few.
            moe_graph, experts, others = nnx.split(self.moe_blocks, nnx.PathContains("experts"), ...)

            def moe_layer(carry: _Carry, index_and_state: tuple[Array, nnx.State]) -> tuple[_Carry, None]:
                index, state = index_and_state
                block = nnx.merge(moe_graph, jax.tree.map(lambda leaf: leaf, experts), state)
                h, cache = carry
                return block.decode(h, rotation, cache, dense + index, positions, expert_layer=index), None

            carry, _ = lax.scan(moe_layer, carry, (jnp.arange(self.config.num_moe_layers), others))
        h, cache = carry
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
        """One MTP module behind a cache (made with `mtp=True`), for self-speculation.

        Args:
          hidden: depth - 1's hidden states at `positions` (`decode`'s or `prefill`'s for depth 1).
          tokens: the token `depth` places after each position.
          positions: as in `decode`.

        Returns:
          Hidden states ready for `head`, predicting the token after `tokens`, and the cache.
        """
        module = self.mtp[depth - 1]
        layer = self.config.num_hidden_layers + depth - 1
        rotation = make_rotation(self.config, positions)
        h = module.join(hidden, self.embedding(tokens))
        h, cache = module.block.decode(h, rotation, cache, layer, positions)
        return module.output_norm(h), cache

    def _scan_cached(
        self, layer: Any, h: Float[Array, "B T d"], cache: LatentCache
    ) -> tuple[Float[Array, "B T d"], LatentCache]:
        """Scans `layer` over all main layers with the cache carried along, so that it is written in place."""
        dense = self.config.num_dense_layers
        carry = (h, cache)
        if dense:
            graph, stacked = nnx.split(self.dense_blocks)
            carry, _ = lax.scan(lambda c, x, graph=graph: layer(c, x, graph), carry, (jnp.arange(dense), stacked))
        if self.config.num_moe_layers:
            graph, stacked = nnx.split(self.moe_blocks)
            indices = dense + jnp.arange(self.config.num_moe_layers)
            carry, _ = lax.scan(lambda c, x, graph=graph: layer(c, x, graph), carry, (indices, stacked))
        return carry


def _stack(config: ModelConfig, layers: int, *, moe: bool, rngs: nnx.Rngs, **make: Any) -> Block:
    """`layers` blocks as one, every parameter with a leading layer axis."""

    @nnx.split_rngs(splits=layers)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def build(rngs: nnx.Rngs) -> Block:
        return Block(config, moe=moe, rngs=rngs, **make)

    return build(rngs)


# Router biases: state that the training step moves -------------------------------------------------------------


def router_biases(model: DeepSeekV3) -> Float[Array, "layers E"]:
    """The selection biases of all MoE layers, the MTP blocks' last: float32 [L_m + D, E]."""
    return jnp.concatenate([bias[...].reshape(-1, bias.shape[-1]) for bias in _bias_variables(model)])


def set_router_biases(model: DeepSeekV3, biases: Float[Array, "layers E"]) -> None:
    """Writes biases in the layout of `router_biases` into the model."""
    start = 0
    for variable in _bias_variables(model):
        count = variable.size // variable.shape[-1]
        variable[...] = biases[start : start + count].reshape(variable.shape).astype(jnp.float32)
        start += count


def _bias_variables(model: DeepSeekV3) -> list[RouterBias]:
    if not model.config.has_router_bias:
        return []
    blocks = [model.moe_blocks] if model.config.num_moe_layers else []
    blocks += [module.block for module in model.mtp]
    layers = [block.feed_forward for block in blocks]
    return [layer.router.bias for layer in layers if isinstance(layer, MixtureOfExperts)]
