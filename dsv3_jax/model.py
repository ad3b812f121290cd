"""DeepSeek-V3: embedding, dense blocks, MoE blocks, norm, head, and the multi-token prediction chain (section 2).

Homogeneous layers are stacked and scanned, so that a 61-layer model is traced and compiled as one dense and one MoE
block. The module holds parameters; every method is a pure function of them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.decoding import CachedDecoding
from dsv3_jax.errors import UserError
from dsv3_jax.modules.attention_core import AttentionChoice
from dsv3_jax.modules.balance import Routing
from dsv3_jax.modules.block import Block, BlockInputs, LayerStatistics
from dsv3_jax.modules.devices import Devices, OneDevice
from dsv3_jax.modules.embedding import Embedding, Head
from dsv3_jax.modules.moe import MixtureOfExperts
from dsv3_jax.modules.multi_token import MultiTokenModule
from dsv3_jax.modules.norm import RMSNorm
from dsv3_jax.modules.parameter import LAYERS
from dsv3_jax.modules.rematerialisation import rematerialise
from dsv3_jax.modules.rope import make_rotation
from dsv3_jax.modules.router import RouterBias
from dsv3_jax.modules.segments import positions_in_segments
from dsv3_jax.precision import PRECISIONS, Precision

MOST_UNROLLED_LAYERS = 8
"""The most layers of a stack that are compiled one by one instead of as a loop."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Features:
    """Hidden states ready for the output head.

    Attributes:
      hidden: those of the main model, after the final norm.
      mtp_hidden: one array per depth k = 1..D, after the module's output norm; position i predicts token i+k+1.
      routing: statistics of the MoE layers, then of the MTP blocks; None for a model without MoE layers.
      largest_logits: float32, the largest attention logit of every head, at least 0, in all layers and then in the MTP
        blocks; None where not asked for.
    """

    hidden: Float[Array, "B T d"]
    mtp_hidden: tuple[Float[Array, "B Tk d"], ...]
    routing: Routing | None
    largest_logits: Float[Array, "layers H"] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelOutput:
    """What a forward pass returns.

    Attributes:
      logits: float32, of the main head.
      mtp_logits: float32, one array per MTP depth k.
      routing: as in `Features`.
    """

    logits: Float[Array, "B T V"]
    mtp_logits: tuple[Float[Array, "B Tk V"], ...]
    routing: Routing | None


class DeepSeekV3(CachedDecoding):
    """The model: its parameters, and its forward pass over whole sequences.

    Args:
      config: the architecture.
      rngs: random keys of the initial weights (stream `params`).
      precision: recipe of the computation; float32 unless given.
      devices: where it runs: `OneDevice()`, or `dsv3_jax.sharding.on_mesh.OnMesh(mesh)`.
      param_dtype: dtype the parameters are stored in (router biases are float32 always).
      remat: name of a rematerialisation policy (`dsv3_jax.modules.rematerialisation`).
      attention: what computes attention in `__call__` and `features` (`dsv3_jax.modules.attention_core`).

    Raises:
      ConfigError: no rematerialisation policy has that name.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        precision: Precision = PRECISIONS["float32"],
        devices: Devices = OneDevice(),
        param_dtype: jnp.dtype = jnp.float32,
        remat: str = "none",
        attention: AttentionChoice = "auto",
    ):
        rematerialise(lambda: None, remat)  # refuses an unknown name here, not at the first step
        self.config = config
        self.precision = precision
        self.devices = devices
        self.remat = remat
        self.attention: AttentionChoice = attention
        dtype = jnp.dtype(param_dtype)
        make: dict[str, Any] = {"dtype": dtype, "precision": precision, "devices": devices}
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
        """Returns the logits of every position; arguments as in `features`.

        Raises:
          UserError: tokens are no whole numbers of shape [B, T], are outside the vocabulary (unless traced by jit), or
            are more than the model's context.
        """
        tokens = self._checked(tokens, positions)
        features = self.features(tokens, positions=positions, segment_ids=segment_ids)
        with jax.named_scope("head"):
            logits = self.head(features.hidden)
            mtp_logits = tuple(self.head(hidden) for hidden in features.mtp_hidden)
        return ModelOutput(logits=logits, mtp_logits=mtp_logits, routing=features.routing)

    def _checked(self, tokens: Any, positions: Any) -> Int[Array, "B T"]:
        if not isinstance(tokens, jax.Array):
            tokens = jnp.asarray(tokens)
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise UserError(f"tokens must be whole numbers of shape [batch, length], not {tokens.dtype}{tokens.shape}")
        context, vocabulary = self.config.max_position_embeddings, self.config.vocab_size
        if positions is None and tokens.shape[1] > context:
            raise UserError(f"{tokens.shape[1]} tokens are more than the model's context of {context}")
        if not isinstance(tokens, Tracer) and tokens.size and tokens.is_fully_addressable:
            values = np.asarray(tokens)  # jnp would make a tracer of it inside jit
            for token in (int(values.min()), int(values.max())):
                if not 0 <= token < vocabulary:
                    raise UserError(f"token {token} is outside the model's vocabulary of {vocabulary}")
        return tokens

    def __repr__(self) -> str:
        config = self.config
        return (
            f"DeepSeekV3({config.num_parameters(mtp=True):,} parameters, {config.num_hidden_layers} layers of width "
            f"{config.hidden_size}, {config.num_nextn_predict_layers} MTP modules)"
        )

    def features(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        isolate_segments: bool = True,
        experts: Int[Array, "layers B T K"] | None = None,
        measure_logits: bool = False,
    ) -> Features:
        """Returns the hidden states before the output head, for losses that never hold all logits.

        Args:
          tokens: int32.
          positions: int32 RoPE positions; unless given, those in each segment where segments are isolated, else
            0 .. T-1. The causal mask follows the order of the tokens, not their positions.
          segment_ids: int32; 0 marks padding, which routing statistics leave out. The sign does not matter.
          isolate_segments: whether attention stays inside equal segment ids. With False the ids mark padding only
            (the report packs documents without a mask between them).
          experts: int32, the experts of every token in the MoE layers of the main model, instead of those that the
            routers choose. Gates are computed from the affinities as ever, and so are the routing statistics.
          measure_logits: whether to return the largest attention logits, padding left out.
        """
        inputs = self.block_inputs(tokens, positions, segment_ids, isolate_segments=isolate_segments)
        inputs = dataclasses.replace(inputs, measure_logits=measure_logits)
        with jax.named_scope("embedding"):
            embedded = self.embedding(tokens)
        stream, statistics = self._main_blocks(embedded, inputs, experts)
        hidden = self.final_norm(stream)
        with jax.named_scope("multi_token_prediction"):
            mtp_hidden, of_modules = self.multi_token(stream, hidden, embedded, inputs)
        joined = LayerStatistics.join([*statistics, *of_modules])
        return Features(hidden, mtp_hidden, joined.routing, joined.largest_logits)

    def block_inputs(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None,
        segment_ids: Int[Array, "B T"] | None,
        *,
        isolate_segments: bool,
    ) -> BlockInputs:
        """Returns what every block is given besides the hidden state; arguments as in `features`."""
        isolated = jnp.abs(segment_ids) if isolate_segments and segment_ids is not None else None
        if positions is None and isolated is not None:
            positions = positions_in_segments(isolated)
        elif positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return BlockInputs(
            rotation=make_rotation(self.config, positions),
            segment_ids=isolated,
            token_mask=None if segment_ids is None else segment_ids != 0,
            attention=self.attention,
        )

    def _main_blocks(
        self, h: Float[Array, "B T d"], inputs: BlockInputs, experts: Int[Array, "layers B T K"] | None
    ) -> tuple[Float[Array, "B T d"], list[LayerStatistics]]:
        """Applies all layers of the main model; returns the residual stream and the statistics of every stack."""
        found = []
        if self.config.num_dense_layers:
            h, statistics = self.scan_blocks(self.dense_blocks, h, inputs)
            found.append(statistics)
        if self.config.num_moe_layers:
            h, statistics = self.scan_blocks(self.moe_blocks, h, inputs, experts)
            found.append(statistics)
        return h, found

    def scan_blocks(
        self,
        blocks: Block,
        h: Float[Array, "B T d"],
        inputs: BlockInputs,
        experts: Int[Array, "layers B T K"] | None = None,
    ) -> tuple[Float[Array, "B T d"], LayerStatistics]:
        """Applies stacked blocks one after the other; `experts` as in `features`."""
        graph, stacked = nnx.split(blocks)

        def layer(
            h: Float[Array, "B T d"], item: tuple[nnx.State, Int[Array, "B T K"] | None]
        ) -> tuple[Float[Array, "B T d"], LayerStatistics]:
            state, experts = item
            return nnx.merge(graph, state)(h, inputs, experts)

        return lax.scan(rematerialise(layer, self.remat), h, (stacked, experts), unroll=self._unroll(stacked))

    def _unroll(self, stacked: nnx.State) -> int:
        """Returns how many layers are unrolled in one iteration of the compiled loop: all of a few, or one.

        A loop copies what it keeps for the backward pass into stacked buffers, which it first fills with zeros: a
        seventh of a small model's step. Few layers are therefore unrolled. With rematerialisation they stay a loop,
        which keeps the compiler from merging the recomputation with the first computation.
        """
        layers = jax.tree.leaves(stacked)[0].shape[0]
        return layers if self.remat == "none" and layers <= MOST_UNROLLED_LAYERS else 1

    def multi_token(
        self,
        stream: Float[Array, "B T d"],
        hidden: Float[Array, "B T d"],
        embedded: Float[Array, "B T d"],
        inputs: BlockInputs,
    ) -> tuple[tuple[Float[Array, "B Tk d"], ...], list[LayerStatistics]]:
        """Applies the chain of MTP modules (Eq. 21-22) to the embeddings of the main pass.

        Depth k has T-k positions. It runs on all T, because padded shapes compile to faster programs; the last k
        positions, which see embeddings of the sequence's start, are left out of the statistics and cut off (the causal
        mask hides them from the others).

        Args:
          stream, hidden: the main model's residual stream before and after the final norm.
          embedded: embeddings of the tokens.

        Returns:
          Hidden states [B, T-k, d] of each depth k after its output norm, and its block's statistics.
        """
        previous = hidden if self.config.mtp_hidden_after_final_norm else stream
        length = embedded.shape[1]
        results, found = [], []
        for k, module in enumerate(self.mtp, start=1):
            shifted = jnp.roll(embedded, -k, axis=1)
            inside = jnp.broadcast_to(jnp.arange(length) < length - k, embedded.shape[:2])
            if inputs.token_mask is not None:  # a token whose k-th successor is padding is not counted either
                inside = inside & inputs.token_mask & jnp.roll(inputs.token_mask, -k, axis=1)
            block_inputs = dataclasses.replace(inputs, token_mask=inside)
            graph, state = nnx.split(module.block)

            def block(
                h: Float[Array, "B T d"], state: nnx.State, inputs: BlockInputs, graph: Any = graph
            ) -> tuple[Float[Array, "B T d"], LayerStatistics]:
                return nnx.merge(graph, state)(h, inputs)

            out, statistics = rematerialise(block, self.remat)(module.join(previous, shifted), state, block_inputs)
            normed = module.output_norm(out)
            previous = normed if self.config.mtp_hidden_after_final_norm else out
            results.append(normed[:, : length - k])
            found.append(jax.tree.map(lambda leaf: leaf[None], statistics))
        return tuple(results), found


def _stack(config: ModelConfig, layers: int, *, moe: bool, rngs: nnx.Rngs, **make: Any) -> Block:
    """Returns `layers` blocks as one, every parameter with a leading layer axis."""

    @nnx.split_rngs(splits=layers)
    @nnx.vmap(in_axes=(0,), out_axes=0, transform_metadata={nnx.PARTITION_NAME: LAYERS})
    def build(rngs: nnx.Rngs) -> Block:
        return Block(config, moe=moe, rngs=rngs, **make)

    return build(rngs)


def abstract_model(config: ModelConfig, **options: Any) -> DeepSeekV3:
    """Returns `DeepSeekV3(config, **options)` with shapes and dtypes in the place of arrays; nothing is computed."""
    return nnx.eval_shape(lambda: DeepSeekV3(config, rngs=nnx.Rngs(0), **options))


# Router biases: state that the training step moves -------------------------------------------------------------


def router_biases(model: DeepSeekV3) -> Float[Array, "layers E"]:
    """Returns the selection biases of all MoE layers and then of the MTP blocks: float32 [L_m + D, E]."""
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
