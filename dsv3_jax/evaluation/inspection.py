"""Facts about a model and its tokenizer, as a table of plain values that can be printed or written as JSON."""

from __future__ import annotations

from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.counts import count_flops, count_parameters
from dsv3_jax.data import Tokenizer
from dsv3_jax.interop.account import Account
from dsv3_jax.interop.checkpoint_folder import CheckpointFolder
from dsv3_jax.interop.parameter_tree import arrays
from dsv3_jax.model import DeepSeekV3

Facts = dict[str, Any]


def architecture_facts(config: ModelConfig) -> Facts:
    """Returns the architecture in words and its counts of parameters, operations and cache, without allocating."""
    counts = count_parameters(config)
    latent = config.kv_lora_rank + config.qk_rope_head_dim
    groups = f", from {config.topk_group} of {config.n_group} groups" if config.n_group > 1 else ""
    scaling = f", extended {config.rope_scaling.factor:g} times by YaRN" if config.rope_scaling else ""
    return {
        "layers": f"{config.num_hidden_layers}, of which {config.num_dense_layers} dense; width {config.hidden_size}",
        "attention": f"{config.num_attention_heads} heads; latents of {config.kv_lora_rank} for keys and values, "
        f"{config.q_lora_rank or 'none'} for queries",
        "cache per token": f"{latent * config.num_hidden_layers:,} values",
        "experts": f"{config.n_routed_experts} routed, {config.num_experts_per_tok} used per token{groups}; "
        f"{config.n_shared_experts} shared; width {config.moe_intermediate_size}",
        "routing": f"{config.scoring_func}, {config.topk_method}, gates times {config.routed_scaling_factor:g}",
        "context": f"{config.max_position_embeddings:,} tokens{scaling}",
        "vocabulary": f"{config.vocab_size:,} ids",
        "parameters": f"{counts.total:,}, of which {counts.active:,} are used per token",
        "MTP": f"{config.num_nextn_predict_layers} modules with {counts.mtp_total:,} parameters",
        "operations per token": f"{count_flops(config, config.max_position_embeddings).forward:.4g} forward, "
        "at full context",
    }


def tokenizer_facts(tokenizer: Tokenizer) -> Facts:
    """Returns the sizes of a tokenizer, its control tokens, and the files beside it."""
    sizes = tokenizer.token_bytes[tokenizer.token_bytes > 0]

    def token(index: int) -> str:
        return f"{index} {tokenizer.to_bytes([index]).decode(errors='replace')}"

    return {
        "ids": f"{tokenizer.vocab_size:,}, of which {tokenizer.vocab_size - len(sizes):,} stand for no text",
        "bytes of an id": f"{sizes.mean():.2f} on average, {sizes.max()} at most",
        "begin of text": token(tokenizer.bos_id) + ("; prompts begin with it" if tokenizer.adds_bos else ""),
        "ends of text": ", ".join(map(token, tokenizer.end_ids)),
        "files beside it": ", ".join(sorted(tokenizer.companions)) or "none",
    }


def weight_facts(model: DeepSeekV3) -> list[Facts]:
    """Returns name, shape, dtype, root mean square and largest absolute value of every array, largest value first."""
    found = []
    for name, array in arrays(model).items():
        values = jnp.asarray(array, jnp.float32)
        largest, square = jax.device_get((jnp.max(jnp.abs(values)), jnp.mean(values**2)))
        found.append(
            {
                "name": name,
                "shape": list(array.shape),
                "dtype": str(array.dtype),
                "rms": float(np.sqrt(square)),
                "largest": float(largest),
            }
        )
    return sorted(found, key=lambda facts: -facts["largest"])


def expert_load(model: DeepSeekV3, ids: list[int]) -> Int[np.ndarray, "layers E"]:
    """Returns how many tokens of a text each expert gets, in every layer with experts and every MTP module.

    Args:
      ids: the text. It is read in rows of the model's context; the last row is padded.
    """
    length = min(model.config.max_position_embeddings, max(len(ids), model.config.num_nextn_predict_layers + 1))
    count = -(-len(ids) // length)
    tokens = np.zeros((count, length), np.int32)
    tokens.reshape(-1)[: len(ids)] = ids
    segments = (np.arange(count * length) < len(ids)).astype(np.int32).reshape(count, length)

    @nnx.jit
    def load(model: DeepSeekV3, tokens: jax.Array, segments: jax.Array) -> jax.Array:
        routing = model.features(tokens, segment_ids=segments).routing
        assert routing is not None  # the model has experts
        return routing.load

    rows = zip(tokens[:, None], segments[:, None], strict=True)
    return np.sum([jax.device_get(load(model, *map(jnp.asarray, row))) for row in rows], axis=0)


def load_facts(load: Int[np.ndarray, "layers E"], config: ModelConfig) -> list[Facts]:
    """Returns for every layer with experts how evenly a text is spread over them.

    max_violation is (tokens of the busiest expert / mean) - 1; 0 is balanced.
    """
    return [
        {
            "layer": name,
            "max_violation": float(row.max() / row.mean() - 1),
            "unused": int((row == 0).sum()),
            "busiest": [int(expert) for expert in np.argsort(-row, kind="stable")[:3]],
        }
        for name, row in zip(_layer_names(len(load), config), np.asarray(load, np.int64), strict=True)
    ]


def bias_facts(biases: np.ndarray, config: ModelConfig) -> list[Facts]:
    """Returns smallest and largest router bias and their standard deviation for every layer with experts.

    Args:
      biases: float [layers, E], as `model.router_biases` returns them or as a published checkpoint stores them.
    """
    return [
        {"layer": name, "least": float(row.min()), "most": float(row.max()), "deviation": float(row.std())}
        for name, row in zip(_layer_names(len(biases), config), np.asarray(biases, np.float64), strict=True)
    ]


def _layer_names(count: int, config: ModelConfig) -> list[str]:
    """Returns the names of the first `count` layers with experts, MTP modules last."""
    first, last = config.num_dense_layers, config.num_hidden_layers
    layers = range(first, first + count)
    return [f"layer {layer}" if layer < last else f"MTP {layer - last + 1}" for layer in layers]


def stored_facts(checkpoint: CheckpointFolder, account: Account) -> Facts:
    """Returns what a published checkpoint stores, from the headers of its files alone."""
    facts: Facts = {
        "tensors": f"{account.tensor_count:,}, of which {len(account.scales):,} are FP8 scales and "
        f"{len(account.ignored):,} are not needed"
    }
    if checkpoint.entries is not None:
        entries = checkpoint.entries.values()
        dtypes = Counter()
        for entry in entries:
            dtypes[entry.dtype] += entry.size
        facts["dtypes"] = ", ".join(f"{dtype} {count:,}" for dtype, count in dtypes.most_common())
        facts["bytes"] = f"{sum(entry.nbytes for entry in entries):,} in {len({e.path for e in entries})} files"
    return facts


def stored_biases(checkpoint: CheckpointFolder, account: Account) -> np.ndarray | None:
    """Returns the router biases of a published checkpoint, [layers, E]; None where it has none or only its index.

    Nothing but the biases is read.
    """
    names = [tensor.name for tensor in account.consumed if tensor.path.endswith("router.bias")]
    if checkpoint.entries is None or not names:
        return None
    return np.stack([np.asarray(checkpoint.entries[name].read(), np.float32) for name in names])
