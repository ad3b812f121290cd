"""Loads the golden checkpoints without the project's own importer, so that each is a check on the other."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file

from dsv3_jax.config import ModelConfig, RopeScaling
from dsv3_jax.model import DeepSeekV3

FOLDER = Path(__file__).parent / "golden"


@dataclasses.dataclass(frozen=True)
class Golden:
    """A checkpoint's configuration, its tensors under their published names, and recorded inputs and outputs."""

    config: ModelConfig
    tensors: dict[str, np.ndarray]
    io: dict[str, np.ndarray]


def load_golden(name: str) -> Golden:
    """Returns the golden data called `name`."""
    folder = FOLDER / name
    published = json.loads((folder / "config.json").read_text())
    fields = {field.name: published[field.name] for field in dataclasses.fields(ModelConfig) if field.name in published}
    scaling = published.get("rope_scaling")
    if scaling:
        known = {field.name for field in dataclasses.fields(RopeScaling)}
        fields["rope_scaling"] = RopeScaling(**{key: value for key, value in scaling.items() if key in known})
    fields.setdefault("num_nextn_predict_layers", 0)
    return Golden(ModelConfig(**fields), load_file(folder / "model.safetensors"), load_file(folder / "io.safetensors"))


def build_model(golden: Golden, config: ModelConfig | None = None, **kwargs: object) -> DeepSeekV3:
    """Returns a model with the golden tensors; `config` replaces the golden one (same shapes)."""
    config = config or golden.config
    model = nnx.eval_shape(lambda: DeepSeekV3(config, rngs=nnx.Rngs(0), **kwargs))
    values = jax.tree.map(jnp.asarray, parameters(golden, config))
    nnx.update(model, nnx.State(values))
    return model


def parameters(golden: Golden, config: ModelConfig) -> dict:
    """Returns the golden tensors in the layout of our parameter tree, router biases included."""
    layers = config.num_hidden_layers
    dense, moe = range(config.num_dense_layers), range(config.num_dense_layers, layers)
    tree = {
        "embedding": {"weight": golden.tensors["model.embed_tokens.weight"]},
        "final_norm": {"weight": golden.tensors["model.norm.weight"]},
        "head": {"weight": golden.tensors["lm_head.weight"]},
    }
    if dense:
        tree["dense_blocks"] = _stack([_block(golden.tensors, config, i, moe=False) for i in dense])
    if moe:
        tree["moe_blocks"] = _stack([_block(golden.tensors, config, i, moe=True) for i in moe])
    tree["mtp"] = {}
    for k in range(config.num_nextn_predict_layers):
        prefix = f"model.layers.{layers + k}."
        tree["mtp"][k] = {
            "embedding_norm": {"weight": golden.tensors[prefix + "enorm.weight"]},
            "hidden_norm": {"weight": golden.tensors[prefix + "hnorm.weight"]},
            "projection": {"weight": golden.tensors[prefix + "eh_proj.weight"]},
            "output_norm": {"weight": golden.tensors[prefix + "shared_head.norm.weight"]},
            "block": _block(golden.tensors, config, layers + k, moe=True),
        }
    return tree


def _stack(trees: list[dict]) -> dict:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def _block(tensors: dict[str, np.ndarray], config: ModelConfig, layer: int, *, moe: bool) -> dict:
    prefix = f"model.layers.{layer}."

    def weight(name: str, *shape: int) -> dict:
        tensor = tensors[f"{prefix}{name}.weight"]
        return {"weight": tensor.reshape(shape) if shape else tensor}

    heads = config.num_attention_heads
    query_in = config.q_lora_rank or config.hidden_size
    attention = {
        "q_b": weight(
            "self_attn.q_b_proj" if config.q_lora_rank else "self_attn.q_proj", heads, config.qk_head_dim, query_in
        ),
        "kv_a": weight("self_attn.kv_a_proj_with_mqa"),
        "kv_a_norm": weight("self_attn.kv_a_layernorm"),
        "kv_b": weight("self_attn.kv_b_proj", heads, config.qk_nope_head_dim + config.v_head_dim, config.kv_lora_rank),
        "o": weight("self_attn.o_proj", config.hidden_size, heads, config.v_head_dim),
    }
    if config.q_lora_rank:
        attention["q_a"] = weight("self_attn.q_a_proj")
        attention["q_a_norm"] = weight("self_attn.q_a_layernorm")

    def swiglu(name: str) -> tuple[np.ndarray, np.ndarray]:
        gate_up = np.stack([weight(f"{name}.gate_proj")["weight"], weight(f"{name}.up_proj")["weight"]])
        return gate_up, weight(f"{name}.down_proj")["weight"]

    if moe:
        experts = [swiglu(f"mlp.experts.{e}") for e in range(config.n_routed_experts)]
        feed_forward = {
            "router": weight("mlp.gate"),
            "experts": {
                "gate_up": np.stack([gate_up for gate_up, _ in experts]),
                "down": np.stack([down for _, down in experts]),
            },
        }
        if config.has_router_bias:
            feed_forward["router"]["bias"] = tensors[f"{prefix}mlp.gate.e_score_correction_bias"].astype(np.float32)
        if config.n_shared_experts:
            gate_up, down = swiglu("mlp.shared_experts")
            feed_forward["shared"] = {"gate_up": {"weight": gate_up}, "down": {"weight": down}}
    else:
        gate_up, down = swiglu("mlp")
        feed_forward = {"gate_up": {"weight": gate_up}, "down": {"weight": down}}
    return {
        "attention_norm": weight("input_layernorm"),
        "attention": attention,
        "feed_forward_norm": weight("post_attention_layernorm"),
        "feed_forward": feed_forward,
    }
