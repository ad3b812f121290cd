"""Describes the attention that a training step computes on its target: its operations, and what it keeps and needs.

What computes attention depends on the device (`modules.attention_core`): a kernel of `pallas_kernels` on a Hopper GPU
or a TPU, cuDNN where the run asks for it, plain products elsewhere. A backward pass computes the logits again; kernels
with one pass for queries and one for keys compute logits and gradients of weights twice.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

import pallas_kernels
from dsv3_jax.config import ModelConfig
from dsv3_jax.modules.attention_core import KEPT_LENGTH, LARGEST_CHUNK, even_chunk
from dsv3_jax.planning.config import PlanConfig
from dsv3_jax.precision import AttendedRows, KeptOutput
from pallas_kernels.device import described_target

AttentionForm = Literal["scan", "hopper", "tpu", "cudnn"]

_FLOAT32 = 4  # bytes
_LOGIT_COPIES = 3  # of plain products: logits, weights and their gradient
_TILES = {"hopper": 128, "cudnn": 128, "tpu": 512}  # positions of a kernel's tiles, of queries and of keys


def attention_form(config: PlanConfig) -> AttentionForm:
    """Returns what computes attention in the step."""
    platform = config.target.accelerator.platform
    if platform == "cpu" or config.attention == "scan":
        return "scan"
    if config.attention == "cudnn" and platform == "gpu":
        return "cudnn"
    model = config.model
    widths = (model.qk_head_dim, model.qk_nope_head_dim, model.v_head_dim)
    q, k, v = (jax.ShapeDtypeStruct((1, 1, 1, width), config.recipe.dtype) for width in widths)
    with described_target("NVIDIA H200" if platform == "gpu" else config.target.accelerator.name, platform):
        if not pallas_kernels.has_attention_kernel(q, k, v):  # pyright: ignore[reportArgumentType]
            return "scan"
    return "hopper" if platform == "gpu" else "tpu"


def keeps_core(config: PlanConfig) -> bool:
    """Returns whether what the policy "report" keeps of attention's output serves its own backward pass too."""
    is_kernel = attention_form(config) in ("hopper", "tpu")
    return is_kernel and config.mesh.context == 1 and KeptOutput.of(config.recipe, config.model.v_head_dim) is not None


@dataclasses.dataclass(frozen=True)
class CoreOperations:
    """Operations of the attention core.

    Attributes:
      backward: operations of the backward pass over those of the forward pass.
      computed: operations of the forward pass over those of the causal half at the model's own widths.
    """

    backward: float
    computed: float


def attention_core(model: ModelConfig, length: int, form: AttentionForm) -> CoreOperations:
    """Returns the operations of the core. Tiles on the diagonal are computed whole.

    Forward there are two products. Backward the scan and cuDNN compute five, the kernels seven.
    """
    keys, values = model.qk_head_dim, model.v_head_dim
    if form == "scan" and length <= KEPT_LENGTH:  # two chunks of queries, whose logits are kept
        return CoreOperations(2.0, 1.5)
    tile = even_chunk(length) if form == "scan" else _TILES[form]
    tiles = -(-length // tile)
    computed = tiles * (tiles + 1) * (tile / length) ** 2
    if form == "scan":
        return CoreOperations((3 * keys + 2 * values) / (keys + values), computed)
    if form == "cudnn":  # values are as wide as keys
        return CoreOperations(5 / 2, computed * 2 * keys / (keys + values))
    return CoreOperations((4 * keys + 3 * values) / (keys + values), computed)


def attention_core_memory(config: PlanConfig) -> float:
    """Returns the bytes that the attention core needs in its backward pass beyond what was kept for it."""
    model, width, form = config.model, config.recipe.dtype.itemsize, attention_form(config)
    heads = model.num_attention_heads / config.mesh.tensor / config.mesh.context
    length = config.sequence_length
    if form == "cudnn":  # gradients of queries, of keys and of values as wide as these
        return config.micro_batch_size * heads * length * (3 * model.qk_head_dim * width + _FLOAT32)
    if form != "scan":  # gradients; a mean of each row; partial sums of the gradient of the keys that heads share
        own = model.qk_head_dim + model.qk_nope_head_dim + model.v_head_dim
        shared = model.qk_rope_head_dim * _FLOAT32
        return config.micro_batch_size * length * (heads * (own * width + _FLOAT32) + shared)
    keys = length if length <= KEPT_LENGTH else LARGEST_CHUNK
    logits = config.micro_batch_size * heads * min(LARGEST_CHUNK, length) * keys * _FLOAT32 * _LOGIT_COPIES
    if length <= KEPT_LENGTH:
        return logits
    # Gradients of queries are added up tile by tile in float32; those of keys and values for one chunk at a time.
    per_token = model.qk_head_dim * _FLOAT32 + (model.qk_head_dim + model.v_head_dim) * width
    per_chunk = (model.qk_head_dim + model.v_head_dim) * _FLOAT32
    return logits + config.micro_batch_size * heads * (length * per_token + LARGEST_CHUNK * per_chunk)


def attend_as_kernel(
    form: AttentionForm,
    kept: KeptOutput | None,
    queries: Float[Array, "B T H qk"],
    keys: Float[Array, "B T H c"],
    values: Float[Array, "B T H v"],
    shared_keys: Float[Array, "B T r"],
) -> Float[Array, "B T H v"] | AttendedRows:
    """Returns an array of the attended values' shape, of a function that keeps for its backward pass what kernels keep.

    It is for tracing only: operands, result and the logarithms of the rows' sums are kept, as by the kernels, but the
    numbers are others.
    """
    if form == "cudnn":
        repeated = jnp.broadcast_to(shared_keys[:, :, None], (*keys.shape[:3], shared_keys.shape[-1]))
        keys = jnp.concatenate([keys, repeated], axis=-1)
        wide = jnp.pad(values, [(0, 0)] * 3 + [(0, queries.shape[-1] - values.shape[-1])])
        out, _ = cast("tuple[Array, Any]", _kept_by_kernel(None, queries, keys, wide, None))
        return out[..., : values.shape[-1]]
    out, packed = cast("tuple[Array, Any]", _kept_by_kernel(kept, queries, keys, values, shared_keys))
    return out if kept is None else AttendedRows(out, packed)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kept_by_kernel(
    kept: KeptOutput | None,
    queries: Float[Array, "B T H qk"],
    keys: Float[Array, "B T H c"],
    values: Float[Array, "B T H v"],
    shared_keys: Float[Array, "B T r"] | None,
) -> tuple[Float[Array, "B T H v"], Any]:
    return _forward(kept, queries, keys, values, shared_keys)[0]


def _forward(
    kept: KeptOutput | None, queries: Array, keys: Array, values: Array, shared_keys: Array | None
) -> tuple[tuple[Array, Any], tuple]:
    log_sums = jnp.einsum("bthc,bthc->bht", keys, keys, preferred_element_type=jnp.float32)
    state = jnp.einsum("bthc,bthv->bhcv", queries, values)
    out = jnp.einsum("bthc,bhcv->bthv", queries, state)
    out, packed, log_sums = (out, None, log_sums) if kept is None else kept.keep(out, log_sums)
    return (out, packed), (queries, keys, values, shared_keys, out if packed is None else packed, log_sums)


def _backward(kept: KeptOutput | None, residuals: tuple, gradients: tuple) -> tuple[Array | None, ...]:
    return residuals[:4]


_kept_by_kernel.defvjp(_forward, _backward)
