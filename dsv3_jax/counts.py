"""Counts parameters and floating-point operations from the configuration, term by term, without allocating arrays.

Conventions. Parameters include router biases (the published checkpoints contain them). "Active" parameters are those
one token uses: all but the routed experts that were not chosen for it. A product of an [m, k] with a [k, n] matrix
counts 2mkn operations. A training step costs three forward passes: one forward, and two for the gradients. Norms,
softmax and activation functions are not counted, as is usual. Report: Table 1 and section 4.2.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsv3_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class BlockParameters:
    """Numbers of parameters of the parts of one transformer block."""

    attention: int  # the projections of MLA and the norms on its latents
    norms: int  # the two RMSNorms of a block
    dense_feed_forward: int
    router: int  # weights and, with `topk_method` noaux_tc, biases
    routed_expert: int  # one expert
    shared_experts: int  # all shared experts together


@dataclasses.dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters of a whole model."""

    block: BlockParameters
    embedding: int
    head: int
    final_norm: int
    dense_layer: int
    moe_layer: int
    moe_layer_active: int
    mtp_module: int  # one MTP module without the embedding and head it shares
    total: int  # main model
    active: int  # main model, used by one token
    mtp_total: int  # all D MTP modules


@dataclasses.dataclass(frozen=True)
class FlopCounts:
    """Floating-point operations per token.

    Attributes:
      terms: forward operations of the main model, summed over its layers, by part of the model.
      mtp_forward: forward operations of all D MTP modules, including their use of the shared output head.
    """

    terms: dict[str, float]
    mtp_forward: float

    @property
    def forward(self) -> float:
        """Operations of one forward pass of the main model."""
        return sum(self.terms.values())

    @property
    def training(self) -> float:
        """Operations of a forward and backward pass of the main model."""
        return 3 * self.forward

    @property
    def training_with_mtp(self) -> float:
        """Operations of a forward and backward pass of the main model and the MTP modules."""
        return 3 * (self.forward + self.mtp_forward)


def count_parameters(config: ModelConfig) -> ParameterCounts:
    """Returns the numbers of parameters of the model that `config` describes, equal to what that model allocates."""
    block = _count_block(config)
    d = config.hidden_size
    experts = config.n_routed_experts * block.routed_expert
    dense_layer = block.attention + block.norms + block.dense_feed_forward
    around_experts = block.attention + block.norms + block.router + block.shared_experts
    moe_layer = around_experts + experts
    moe_layer_active = around_experts + config.num_experts_per_tok * block.routed_expert
    embedding = head = config.vocab_size * d
    joining = 2 * d * d + 3 * d  # the projection of [embedding; hidden state], and three norms
    depth = config.num_nextn_predict_layers
    outer = embedding + head + d
    dense_layers = config.num_dense_layers * dense_layer
    return ParameterCounts(
        block=block,
        embedding=embedding,
        head=head,
        final_norm=d,
        dense_layer=dense_layer,
        moe_layer=moe_layer,
        moe_layer_active=moe_layer_active,
        mtp_module=joining + moe_layer,
        total=outer + dense_layers + config.num_moe_layers * moe_layer,
        active=outer + dense_layers + config.num_moe_layers * moe_layer_active,
        mtp_total=depth * (joining + moe_layer),
    )


def count_flops(config: ModelConfig, sequence_length: int, *, causal: bool = True) -> FlopCounts:
    """Returns the operations per token for sequences of `sequence_length` tokens.

    Args:
      causal: count the sequence_length / 2 keys that a token attends to on average; False counts all sequence_length.
    """
    block = _count_block(config)
    d, heads = config.hidden_size, config.num_attention_heads
    latent_norms = config.kv_lora_rank + (config.q_lora_rank or 0)
    keys_seen = sequence_length / 2 if causal else sequence_length
    layer = {
        "attention_projections": 2.0 * (block.attention - latent_norms),
        "attention_core": 2.0 * heads * (config.qk_head_dim + config.v_head_dim) * keys_seen,
        "router": 2.0 * d * config.n_routed_experts,
        "routed_experts": 2.0 * config.num_experts_per_tok * block.routed_expert,
        "shared_experts": 2.0 * block.shared_experts,
    }
    head = 2.0 * d * config.vocab_size
    dense, moe = config.num_dense_layers, config.num_moe_layers
    terms = {
        "attention_projections": (dense + moe) * layer["attention_projections"],
        "attention_core": (dense + moe) * layer["attention_core"],
        "dense_feed_forward": dense * 2.0 * block.dense_feed_forward,
        "router": moe * layer["router"],
        "routed_experts": moe * layer["routed_experts"],
        "shared_experts": moe * layer["shared_experts"],
        "head": head,
    }
    mtp_module = sum(layer.values()) + 2.0 * 2 * d * d + head
    return FlopCounts(terms=terms, mtp_forward=config.num_nextn_predict_layers * mtp_module)


def _count_block(config: ModelConfig) -> BlockParameters:
    d, heads = config.hidden_size, config.num_attention_heads
    query_in = config.q_lora_rank or d
    queries = heads * config.qk_head_dim * query_in
    if config.q_lora_rank is not None:
        queries += config.q_lora_rank * d + config.q_lora_rank
    keys_values = (config.kv_lora_rank + config.qk_rope_head_dim) * d + config.kv_lora_rank
    keys_values += heads * (config.qk_nope_head_dim + config.v_head_dim) * config.kv_lora_rank
    output = d * heads * config.v_head_dim
    expert = 3 * d * config.moe_intermediate_size
    return BlockParameters(
        attention=queries + keys_values + output,
        norms=2 * d,
        dense_feed_forward=3 * d * config.intermediate_size,
        router=config.n_routed_experts * (d + config.has_router_bias),
        routed_expert=expert,
        shared_experts=config.n_shared_experts * expert,
    )
