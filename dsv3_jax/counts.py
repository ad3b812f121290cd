"""Parameters and floating point operations, counted from the configuration term by term, without allocating.

Conventions. Parameters include router biases (they are in the published checkpoints). "Active" are those one token
passes through: all but the routed experts it was not sent to. A product of an [m, k] with a [k, n] matrix counts
2mkn operations; a training step costs three forward passes (one forward, two for the gradients); norms, softmax and
activation functions are left out, as is usual. Report: Table 1 and section 4.2; MFU figures use the causal count.
"""

from __future__ import annotations

import dataclasses

from dsv3_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class BlockParameters:
    """Parameters of the pieces a transformer block is made of."""

    attention: int  # MLA projections and the norms on its latents
    norms: int  # the two RMSNorms of a block
    dense_feed_forward: int
    router: int  # weights and, where experts are selected with one, biases
    routed_expert: int  # one expert
    shared_experts: int  # all shared experts together


@dataclasses.dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a whole model."""

    block: BlockParameters
    embedding: int
    head: int
    final_norm: int
    dense_layer: int
    moe_layer: int
    moe_layer_active: int
    mtp_module: int  # one MTP module without the embedding and head it shares
    total: int  # main model
    active: int  # main model, one token
    mtp_total: int  # all D modules
    mtp_active: int


@dataclasses.dataclass(frozen=True)
class FlopCounts:
    """Operations a token. `terms` are forward operations of the main model over all its layers."""

    terms: dict[str, float]
    mtp_forward: float  # all D modules, their pass through the shared head included

    @property
    def forward(self) -> float:
        """Main model, one forward pass."""
        return sum(self.terms.values())

    @property
    def training(self) -> float:
        """Main model, forward and backward."""
        return 3 * self.forward

    @property
    def training_with_mtp(self) -> float:
        """Main model and MTP modules, forward and backward."""
        return 3 * (self.forward + self.mtp_forward)


def count_parameters(config: ModelConfig) -> ParameterCounts:
    """Parameters of the model that `config` describes; equal to what the model allocates."""
    block = _count_block(config)
    d = config.hidden_size
    experts = config.n_routed_experts * block.routed_expert
    dense_layer = block.attention + block.norms + block.dense_feed_forward
    around_experts = block.attention + block.norms + block.router + block.shared_experts
    moe_layer = around_experts + experts
    moe_layer_active = around_experts + config.num_experts_per_tok * block.routed_expert
    embedding = head = config.vocab_size * d
    joining = 2 * d * d + 3 * d  # the projection of [embedding; hidden], and three norms
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
        mtp_active=depth * (joining + moe_layer_active),
    )


def count_flops(config: ModelConfig, sequence_length: int, *, causal: bool = True) -> FlopCounts:
    """Operations a token of a forward pass over sequences of `sequence_length` tokens.

    With `causal`, attention costs a token the (sequence_length / 2) keys it sees on average; otherwise all of them.
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
