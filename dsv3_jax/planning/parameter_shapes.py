"""The parameter tree of ARCHITECTURE.md as shapes, so that the sharding rules themselves say where each weight lies."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax.config import ModelConfig


def parameter_shapes(model: ModelConfig) -> dict[str, Any]:
    """By path; every leaf a float32 shape. What `nnx.state(model, nnx.Param)` has, without making the model."""
    d = model.hidden_size
    tree: dict[str, Any] = {
        "embedding": _weight(model.vocab_size, d),
        "final_norm": _weight(d),
        "head": _weight(model.vocab_size, d),
    }
    if model.num_dense_layers:
        tree["dense_blocks"] = _block(model, (model.num_dense_layers,), moe=False)
    if model.num_moe_layers:
        tree["moe_blocks"] = _block(model, (model.num_moe_layers,), moe=True)
    if model.num_nextn_predict_layers:
        tree["mtp"] = {depth: _mtp_module(model) for depth in range(model.num_nextn_predict_layers)}
    return tree


def _shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def _weight(*sizes: int) -> dict[str, Any]:
    return {"weight": _shape(*sizes)}


def _mtp_module(model: ModelConfig) -> dict[str, Any]:
    d = model.hidden_size
    norms = {name: _weight(d) for name in ("embedding_norm", "hidden_norm", "output_norm")}
    return norms | {"projection": _weight(d, 2 * d), "block": _block(model, (), moe=True)}


def _block(model: ModelConfig, stack: tuple[int, ...], *, moe: bool) -> dict[str, Any]:
    """One block, or with a leading axis several."""
    d, heads = model.hidden_size, model.num_attention_heads
    queries_from = model.q_lora_rank or d
    keys_and_values = model.qk_nope_head_dim + model.v_head_dim
    attention = {
        "q_b": _weight(*stack, heads, model.qk_head_dim, queries_from),
        "kv_a": _weight(*stack, model.kv_lora_rank + model.qk_rope_head_dim, d),
        "kv_a_norm": _weight(*stack, model.kv_lora_rank),
        "kv_b": _weight(*stack, heads, keys_and_values, model.kv_lora_rank),
        "o": _weight(*stack, d, heads, model.v_head_dim),
    }
    if model.q_lora_rank is not None:
        attention["q_a"] = _weight(*stack, model.q_lora_rank, d)
        attention["q_a_norm"] = _weight(*stack, model.q_lora_rank)
    return {
        "attention_norm": _weight(*stack, d),
        "attention": attention,
        "feed_forward_norm": _weight(*stack, d),
        "feed_forward": _mixture(model, stack) if moe else _feed_forward(stack, model.intermediate_size, d),
    }


def _feed_forward(stack: tuple[int, ...], width: int, d: int) -> dict[str, Any]:
    return {"gate_up": _weight(*stack, 2, width, d), "down": _weight(*stack, d, width)}


def _mixture(model: ModelConfig, stack: tuple[int, ...]) -> dict[str, Any]:
    d, width, experts = model.hidden_size, model.moe_intermediate_size, model.n_routed_experts
    mixture: dict[str, Any] = {
        "router": _weight(*stack, experts, d),
        "experts": {
            "gate_up": _shape(*stack, experts, 2, width, d),
            "down": _shape(*stack, experts, d, width),
        },
    }
    if model.n_shared_experts:
        mixture["shared"] = _feed_forward(stack, model.n_shared_experts * width, d)
    return mixture
