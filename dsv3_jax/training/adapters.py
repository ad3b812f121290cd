"""Low-rank adapters (LoRA, Hu et al. 2021): W + (alpha / rank) B A, where only A and B are trained.

The sums are formed once a step, before the forward pass, so that every kernel, number format, mesh and pipeline
computes with them as with other weights. What adapters save is the optimizer's state, not a copy of the weights.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import ConfigError
from dsv3_jax.interop.tensor_names import PublishedTensor, published_tensors
from dsv3_jax.precision.fp8_weight import Fp8Weight
from dsv3_jax.training.config import LoraConfig

Adapters = dict[str, dict[str, jax.Array]]
"""By path of the parameter: `a` [*batch, rank, in] and `b` [*batch, out, rank]; `batch` are layers, experts, ..."""


def adapted_matrices(model: ModelConfig, lora: LoraConfig) -> list[PublishedTensor]:
    """Returns the matrices that have adapters, by their published names.

    Raises:
      ConfigError: a target does not exist in the model.
    """
    matrices = [tensor for tensor in published_tensors(model) if tensor.quantised]
    targets = {name.strip() for name in lora.targets.split(",")}
    if lora.targets in ("attention", "all"):
        wanted = ".self_attn." if lora.targets == "attention" else "."
        targets = {projection_of(tensor) for tensor in matrices if wanted in tensor.name}
    unknown = targets - {projection_of(tensor) for tensor in matrices}
    if unknown:
        known = ", ".join(sorted({projection_of(tensor) for tensor in matrices}))
        raise ConfigError(f"lora.targets: the model has no {sorted(unknown)[0]!r}; it has {known}")
    chosen = [tensor for tensor in matrices if projection_of(tensor) in targets]
    return [tensor for tensor in chosen if lora.experts or ".experts." not in tensor.name]


def projection_of(tensor: PublishedTensor) -> str:
    """Returns the last part of a matrix's published name, such as `o_proj`."""
    return tensor.name.split(".")[-2]


def new_adapters(params: nnx.State, model: ModelConfig, lora: LoraConfig, key: jax.Array) -> Adapters:
    """Returns adapters that add nothing: A uniform in +-1/sqrt(in), B zero, both float32."""
    weights, adapters = _by_path(params), {}
    for tensor in adapted_matrices(model, lora):
        if tensor.path in adapters:
            continue
        weight = weights[tensor.path]
        if isinstance(weight, Fp8Weight):
            raise ConfigError("adapters need weights that are not kept in FP8; load the model without keep_fp8")
        batch, (rows, columns) = weight.shape[: len(tensor.index)], tensor.shape
        limit = 1 / math.sqrt(columns)
        own = jax.random.fold_in(key, len(adapters))
        a = jax.random.uniform(own, (*batch, lora.rank, columns), jnp.float32, -limit, limit)
        adapters[tensor.path] = {"a": a, "b": jnp.zeros((*batch, rows, lora.rank), jnp.float32)}
    return adapters


def with_adapters(params: nnx.State, adapters: Adapters, lora: LoraConfig) -> nnx.State:
    """Returns parameters to which the adapters' products are added, in the parameters' own dtype."""
    merged = []
    for path, variable in nnx.to_flat_state(params):
        adapter = adapters.get(".".join(map(str, path)))
        if adapter is not None:
            weight = variable.get_value()
            change = (lora.alpha / lora.rank) * (adapter["b"] @ adapter["a"])
            variable = variable.replace((weight + change.reshape(weight.shape)).astype(weight.dtype))
        merged.append((path, variable))
    return nnx.from_flat_state(merged)


def _by_path(params: nnx.State) -> dict[str, Any]:
    return {".".join(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(params)}


def published_adapters(adapters: Adapters, model: ModelConfig, lora: LoraConfig) -> dict[str, jax.Array]:
    """Returns the adapters under the names that PEFT gives them: `...lora_A.weight` [rank, in], `...lora_B.weight`."""
    found = {}
    for tensor in adapted_matrices(model, lora):
        name = f"base_model.model.{tensor.name.removesuffix('.weight')}"
        adapter = adapters[tensor.path]
        found[f"{name}.lora_A.weight"] = adapter["a"][tensor.index]
        found[f"{name}.lora_B.weight"] = adapter["b"][tensor.index]
    return found


def peft_config(model: ModelConfig, lora: LoraConfig, base: str) -> dict[str, Any]:
    """Returns what PEFT reads from adapter_config.json.

    Args:
      base: folder or name of the model that the adapters belong to.
    """
    names = [tensor.name.removesuffix(".weight") for tensor in adapted_matrices(model, lora)]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": names,
    }
