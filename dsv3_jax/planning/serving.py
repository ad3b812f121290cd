"""What a deployment unit of the report needs and gives: memory, tokens per second, time per token (section 3.4).

A prefill unit reads prompts, with keys and values expanded; a decode unit adds a token to each of many requests, with
absorbed up-projections. Both hold the experts spread over all devices and the attention on groups of `tensor` devices.
Weights and the products with them are in FP8; attention itself, its cache, and the results of experts that are sent
back are in bfloat16. Two micro-batches are interleaved, so that one is sent while the other is computed: a step takes
as long as the slower of the two. Every time is work divided by the rate that `Accelerator` says is reached; the
latency of messages, the imbalance between ranks and the work of the host are not in it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp

from dsv3_jax.config import ModelConfig
from dsv3_jax.counts import count_parameters
from dsv3_jax.errors import ConfigError
from dsv3_jax.modules.paged_cache import bytes_per_token
from dsv3_jax.planning.hardware import Target

Phase = Literal["prefill", "decode"]

_FP8_BYTES = 1 + 4 / 128**2  # a value, and its share of the scale of a block of 128 x 128
_MEMORY_USED = 0.9  # of a device's memory: the rest is for activations, buffers of the exchange and programs
_REDUNDANT = 8  # there is at least one redundant expert for so many routed ones, as in the report's prefill unit


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServingUnit:
    """A group of devices that serves one copy of the model.

    Attributes:
      config: the model.
      target: its devices.
      phase: whether it reads prompts or generates.
      tensor: devices that share the heads of a sequence.
      batch: tokens that are read in a step for each device (prefill), or requests that run on each (decode).
      context: tokens of a prompt (prefill), or mean tokens that a request has in the cache (decode).
    """

    config: ModelConfig
    target: Target
    phase: Phase
    tensor: int = 4
    batch: int
    context: int

    def __post_init__(self) -> None:
        devices = self.target.devices
        if devices % self.tensor:
            raise ConfigError(f"tensor={self.tensor} must divide the {devices} devices of the unit")
        if self.config.num_attention_heads % self.tensor:
            raise ConfigError(f"tensor={self.tensor} must divide the model's {self.config.num_attention_heads} heads")
        if min(self.batch, self.context) < 1:
            raise ConfigError("a serving unit needs a batch and a context of at least 1 token")
        if not self.config.num_moe_layers:
            raise ConfigError("a serving unit spreads experts over devices, and this model has none")

    @property
    def redundant(self) -> int:
        """Redundant experts: the fewest, at least one for eight, with which every device holds equally many."""
        experts, devices = self.config.n_routed_experts, self.target.devices
        return -(-(experts + experts // _REDUNDANT) // devices) * devices - experts

    @property
    def experts_per_device(self) -> int:
        """Routed experts that a device holds."""
        return (self.config.n_routed_experts + self.redundant) // self.target.devices


@dataclasses.dataclass(frozen=True)
class ServingEstimate:
    """What a unit needs and gives.

    Attributes:
      weights: bytes of weights on a device.
      cache_tokens: tokens of the cache that a device has memory for.
      cache_needed: tokens of the cache that the batch takes on a device.
      seconds: seconds of a step by what takes them: `products`, `attention`, `network`.
      step: seconds of a step.
      tokens_per_second: of a device.
    """

    weights: float
    cache_tokens: int
    cache_needed: int
    seconds: dict[str, float]
    step: float
    tokens_per_second: float


def estimate(unit: ServingUnit) -> ServingEstimate:
    """Returns the estimate of a unit.

    Raises:
      ConfigError: the weights do not fit a device.
    """
    weights = _weight_bytes(unit)
    free = _MEMORY_USED * unit.target.accelerator.memory - weights
    if free <= 0:
        raise ConfigError(
            f"the weights take {weights / 1e9:.0f} GB on each device of {unit.target.accelerator.memory / 1e9:.0f} GB; "
            "use more devices"
        )
    # The latents of a sequence are on every device of its tensor group, which together run `tensor` batches.
    per_token = bytes_per_token(unit.config, jnp.dtype(jnp.bfloat16), mtp=False)
    cached = unit.batch if unit.phase == "prefill" else unit.batch * unit.context
    seconds = {"products": _products(unit), "attention": _attention(unit), "network": _network(unit)}
    step = max(seconds["products"] + seconds["attention"], seconds["network"])
    return ServingEstimate(
        weights=weights,
        cache_tokens=int(free / per_token),
        cache_needed=cached * unit.tensor,
        seconds=seconds,
        step=step,
        tokens_per_second=unit.batch / step,
    )


def _weight_bytes(unit: ServingUnit) -> float:
    config, counts = unit.config, count_parameters(unit.config)
    block = counts.block
    attention = config.num_hidden_layers * block.attention / unit.tensor
    dense = config.num_dense_layers * block.dense_feed_forward
    experts = config.num_moe_layers * (block.shared_experts + unit.experts_per_device * block.routed_expert)
    bfloat16 = config.num_moe_layers * block.router + (counts.embedding + counts.head) / unit.tensor
    return (attention + dense + experts) * _FP8_BYTES + 2 * bfloat16


def _products(unit: ServingUnit) -> float:
    """Returns the seconds of all products with weights in a step on one device."""
    counts, accelerator = count_parameters(unit.config), unit.target.accelerator
    computing = 2 * (counts.active - counts.embedding) * unit.batch / (accelerator.fp8_flops * accelerator.fp8_reached)
    read = _weight_bytes(unit) / (accelerator.bandwidth * accelerator.bandwidth_reached)
    return max(computing, read)


def _attention(unit: ServingUnit) -> float:
    """Returns the seconds of the attention of a step on one device, without its projections."""
    config, accelerator = unit.config, unit.target.accelerator
    flops = accelerator.flops * accelerator.flops_reached
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    if unit.phase == "prefill":  # causal: a token sees half of its prompt on average
        width = config.qk_head_dim + config.v_head_dim
        return layers * unit.batch * 2 * heads * width * unit.context / 2 / flops
    width = 2 * config.kv_lora_rank + config.qk_rope_head_dim
    computing = layers * unit.batch * 2 * heads * width * unit.context / flops
    per_token = bytes_per_token(config, jnp.dtype(jnp.bfloat16), mtp=False)
    read = unit.batch * unit.tensor * unit.context * per_token
    return max(computing, read / (accelerator.bandwidth * accelerator.bandwidth_reached))


def _network(unit: ServingUnit) -> float:
    """Returns the seconds in which a device's slower link sends tokens to experts and receives their results."""
    config, accelerator = unit.config, unit.target.accelerator
    devices, chosen = unit.target.devices, config.num_experts_per_tok
    nodes = math.ceil(devices / accelerator.node)
    row = 3 * config.hidden_size  # dispatched in FP8, combined in bfloat16
    if unit.phase == "prefill":  # one copy for each node, forwarded inside it
        reached = min(config.topk_group, nodes)
        outer, inner = reached * (nodes - 1) / nodes, chosen
    else:  # directly to each expert's device
        outer, inner = chosen * (nodes - 1) / nodes, chosen / nodes
    rows = config.num_moe_layers * unit.batch * row
    within = _reduction(unit) if unit.tensor > 1 else 0.0
    return max(rows * outer / accelerator.outer_link, rows * inner / accelerator.inner_link + within)


def _reduction(unit: ServingUnit) -> float:
    """Returns the seconds in which a tensor group gathers tokens before attention and reduces them after it."""
    sent = 2 * (unit.tensor - 1) * unit.batch * 2 * unit.config.hidden_size * unit.config.num_hidden_layers
    return sent / unit.target.accelerator.inner_link
