"""QK-clip: attention heads whose logits grow too large are scaled down after an update.

Kimi Team (2025, arXiv:2507.20534, section 2.1 and algorithm 1): with S the largest logit of a head in the forward pass
of a step, and gamma = min(1, tau / S), the head's W^UQ and W^UK are multiplied by sqrt(gamma) and its W^QR by gamma, so
that every logit of the head is multiplied by gamma. W^KR, whose rotary key all heads share, stays as it is.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import ConfigError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LargestLogits:
    """The largest attention logit of every head, at least 0; of several passes, the larger one.

    Attributes:
      values: float32; the layers are those of the main model, then the MTP modules.
    """

    values: Float[Array, "layers H"]


def clip_logits(params: nnx.State, largest: LargestLogits, threshold: float, model: ModelConfig) -> nnx.State:
    """Returns the parameters with the queries and keys of heads scaled down whose largest logit is above `threshold`.

    Args:
      params: the parameters that training changes.
      largest: of all layers, or of those of the main model alone, without the MTP modules.
      threshold: tau.

    Raises:
      ConfigError: a matrix of queries or keys is not among the parameters, because it is kept in FP8.
    """
    gamma = threshold / jnp.maximum(largest.values, threshold)
    root = jnp.sqrt(gamma)
    widths = (model.qk_nope_head_dim, model.qk_rope_head_dim, model.v_head_dim)
    plain, rotary, value = (jnp.ones((1, 1, width, 1)) for width in widths)
    root, gamma = root[..., None, None], gamma[..., None, None]
    factors = {
        "q_b": jnp.concatenate([root * plain, gamma * rotary], axis=2),
        "kv_b": jnp.concatenate([root * plain, jnp.ones_like(root) * value], axis=2),
    }
    flat = dict(nnx.to_flat_state(params))
    stacks = [("dense_blocks",)] * model.num_dense_layers + [("moe_blocks",)] * model.num_moe_layers
    stacks += [("mtp", depth, "block") for depth in range(model.num_nextn_predict_layers)]
    for stack in dict.fromkeys(stacks[: largest.values.shape[0]]):
        first, count = stacks.index(stack), stacks.count(stack)
        for name, factor in factors.items():
            path = (*stack, "attention", name, "weight")
            if path not in flat:
                raise ConfigError("training.qk_clip scales weights that are kept in FP8; load them without keep_fp8")
            weight = flat[path].get_value()
            own = factor[first : first + count].reshape(*weight.shape[:-1], 1)
            flat[path] = flat[path].replace((weight * own).astype(weight.dtype))
    return nnx.from_flat_state(list(flat.items()))
