"""Decoupled rotary position embedding and its YaRN extension (report sections 2.1.1 and 4.3).

Pairs are interleaved: (x[2i], x[2i+1]) is rotated by the angle position * w_i. The published weights of V2, V3, R1,
Moonlight and Kimi-K2 have this order.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig, RopeScaling


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rotation:
    """Holds cosine and sine of the angle of every position and pair, float32."""

    cos: Float[Array, "B T half"]
    sin: Float[Array, "B T half"]


def rotary_frequencies(width: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Returns the angular frequencies w_i in radians per position: float64 [width / 2].

    Without scaling, w_i = theta^(-2i/width). YaRN divides a frequency by `factor` where it makes fewer than `beta_slow`
    rotations within the original context, keeps it where it makes more than `beta_fast`, and blends linearly between.
    """
    index = np.arange(width // 2, dtype=np.float64)
    plain = theta ** (-2.0 * index / width)
    if scaling is None:
        return plain

    def pair_turning(rotations: float) -> float:
        context = scaling.original_max_position_embeddings
        return width * math.log(context / (2 * math.pi * rotations)) / (2 * math.log(theta))

    low = max(math.floor(pair_turning(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_turning(scaling.beta_slow)), width - 1)
    ramp = np.clip((index - low) / max(high - low, 0.001), 0.0, 1.0)
    return plain / scaling.factor * ramp + plain * (1.0 - ramp)


def attention_temperature(factor: float, mscale: float) -> float:
    """Returns m(s, a) = 0.1 a ln(s) + 1, by which YaRN scales logits at the extension factor s."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def softmax_scale(config: ModelConfig) -> float:
    """Returns the multiplier of all logits: 1 / sqrt(d_h + d_h^R), under YaRN times m(s, mscale_all_dim)^2."""
    scale = config.qk_head_dim**-0.5
    if config.rope_scaling is not None:
        scale *= attention_temperature(config.rope_scaling.factor, config.rope_scaling.mscale_all_dim) ** 2
    return scale


def make_rotation(config: ModelConfig, positions: Int[Array, "B T"]) -> Rotation:
    """Returns the rotations of `positions`; under YaRN their length is m(s, mscale) / m(s, mscale_all_dim)."""
    scaling = config.rope_scaling
    frequencies = rotary_frequencies(config.qk_rope_head_dim, config.rope_theta, scaling)
    length = 1.0
    if scaling is not None:
        length = attention_temperature(scaling.factor, scaling.mscale) / attention_temperature(
            scaling.factor, scaling.mscale_all_dim
        )
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
    return Rotation(cos=jnp.cos(angles) * length, sin=jnp.sin(angles) * length)


def rotate(x: Float[Array, "B T *heads rope"], rotation: Rotation) -> Float[Array, "B T *heads rope"]:
    """Rotates each pair (x[2i], x[2i+1]) by its angle, in float32; the result has the shape and dtype of x."""
    pairs = x.astype(jnp.promote_types(x.dtype, jnp.float32)).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    middle = (1,) * (x.ndim - 3)
    cos = rotation.cos.reshape(*rotation.cos.shape[:2], *middle, -1)
    sin = rotation.sin.reshape(*rotation.sin.shape[:2], *middle, -1)
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)
