"""Named model configurations: the published models, the report's ablation sizes, and smaller ones down to tests.

Each is a dictionary of `ModelConfig`'s fields. All keep the whole architecture: MLA, a dense first layer, shared and
routed experts, sigmoid affinities with a router bias, and one MTP module (except the models published without one).
"""

from __future__ import annotations

from typing import Any

Fields = dict[str, Any]

_V3_671B: Fields = {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "intermediate_size": 18432,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 163840,
    "rope_theta": 10000.0,
    "rope_scaling": {"factor": 40.0, "original_max_position_embeddings": 4096},
}

_KIMI_K2_1T: Fields = _V3_671B | {
    "vocab_size": 163840,
    "first_k_dense_replace": 1,
    "num_attention_heads": 64,
    "n_routed_experts": 384,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.827,
    "num_nextn_predict_layers": 0,
    "max_position_embeddings": 131072,
    "rope_theta": 50000.0,
    "rope_scaling": {"factor": 32.0, "original_max_position_embeddings": 4096, "beta_fast": 1.0, "beta_slow": 1.0},
}

# The report's small ablation model (15.7B parameters, 2.4B active): DeepSeek-V2-Lite's sizes with V3's sigmoid gating.
_ABLATION_16B: Fields = {
    "vocab_size": 102400,
    "hidden_size": 2048,
    "num_hidden_layers": 27,
    "first_k_dense_replace": 1,
    "intermediate_size": 10944,
    "num_attention_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1408,
}

# Of its large ablation model the report gives only the counts (228.7B parameters, 20.9B active). DeepSeek-V2's sizes
# with V3's three dense layers and V3's vocabulary have these counts.
_ABLATION_229B: Fields = _ABLATION_16B | {
    "vocab_size": 129280,
    "hidden_size": 5120,
    "num_hidden_layers": 60,
    "first_k_dense_replace": 3,
    "intermediate_size": 12288,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "n_routed_experts": 160,
    "n_group": 8,
    "topk_group": 3,
    "moe_intermediate_size": 1536,
}

_MOONLIGHT_16B: Fields = _ABLATION_16B | {
    "vocab_size": 163840,
    "intermediate_size": 11264,
    "routed_scaling_factor": 2.446,
    "num_nextn_predict_layers": 0,
    "max_position_embeddings": 8192,
    "rope_theta": 50000.0,
    "rms_norm_eps": 1e-5,
}

# Trains on one GPU of 80 to 141 GB: float32 weights, gradients and two moments of 1B parameters take 16 GB, and
# activations take the rest.
_1B: Fields = {
    "vocab_size": 32768,
    "hidden_size": 1024,
    "num_hidden_layers": 16,
    "first_k_dense_replace": 1,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "q_lora_rank": 512,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_routed_experts": 64,
    "n_shared_experts": 1,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 256,
    "n_group": 8,
    "topk_group": 3,
    "routed_scaling_factor": 2.5,
}

_MINI: Fields = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "first_k_dense_replace": 1,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "q_lora_rank": 128,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 32,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 128,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 1024,
    "initializer_range": 0.02,
}

_NANO: Fields = _MINI | {
    "vocab_size": 4096,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 32,
    "moe_intermediate_size": 64,
    "max_position_embeddings": 512,
}

_TINY: Fields = _NANO | {
    "vocab_size": 320,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 4,
    "topk_group": 2,
    "max_position_embeddings": 128,
}

PRESETS: dict[str, Fields] = {
    "v3-671b": _V3_671B,
    "kimi-k2-1t": _KIMI_K2_1T,
    "ablation-229b": _ABLATION_229B,
    "ablation-16b": _ABLATION_16B,
    "moonlight-16b": _MOONLIGHT_16B,
    "1b": _1B,
    "mini": _MINI,
    "nano": _NANO,
    "tiny": _TINY,
}


def presets() -> tuple[str, ...]:
    """Returns the names that `ModelConfig.preset` accepts, largest model first."""
    return tuple(PRESETS)
