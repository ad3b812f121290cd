"""What the precision `auto` stands for in a new training run: on a CPU it depends on what the processor is fast at.

Some processors multiply bfloat16 faster than float32 (AMX, AVX512-BF16, and the bfloat16 instructions of ARM). The
processor's flags say which may be; a short measurement of the products of a training step decides.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsv3_jax.default_device import default_device
from dsv3_jax.operating_system import processor_flags
from dsv3_jax.precision.recipe import Precision
from dsv3_jax.precision.weight_product import weight_product

_FLAGS = frozenset({"amx_bf16", "avx512_bf16", "bf16", "svebf16"})
_LEAST_WIDTH = 128  # of the hidden states; of a step of a narrower model products take a small part
_LEAST_GAIN = 1.5  # of products; conversions between the formats take some of it
_ROWS, _REPEATS = 1024, 7


class Choice(NamedTuple):
    """The recipe that `auto` stands for.

    Attributes:
      name: the recipe's name.
      reason: why this one, in words for the user.
    """

    name: str
    reason: str


def automatic_recipe(width: int) -> Choice:
    """Returns the recipe for training a model of hidden size `width` on JAX's default device.

    Raises:
      UserError: JAX finds no device.
    """
    device = default_device()
    if device.platform != "cpu":
        return Choice(Precision.preset("auto").name, f"the fastest on {device.device_kind}")
    if not processor_flags() & _FLAGS:
        return Choice("float32", "this processor has no instructions for bfloat16")
    if width < _LEAST_WIDTH:
        return Choice("float32", "bfloat16 makes only wide products faster")
    gain = bfloat16_gain(width)
    name = "bfloat16" if gain >= _LEAST_GAIN else "float32"
    return Choice(name, f"this processor multiplies {gain:.1f} times as fast in bfloat16 as in float32")


def bfloat16_gain(width: int) -> float:
    """Returns the processor time of a layer's products in float32 over that in bfloat16, measured in turns."""
    formats = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        x, weight = jnp.ones((_ROWS, width), dtype), jnp.ones((4 * width, width), dtype)
        formats[dtype] = (jax.jit(_products).lower(x, weight).compile(), x, weight)
    seconds = {dtype: float("inf") for dtype in formats}
    for _ in range(_REPEATS):
        for dtype, (run, *operands) in formats.items():
            began = time.process_time()
            jax.block_until_ready(run(*operands))
            seconds[dtype] = min(seconds[dtype], time.process_time() - began)
    return seconds[jnp.float32] / seconds[jnp.bfloat16]


def _products(x: Float[Array, "N d"], weight: Float[Array, "w d"]) -> tuple[Array, tuple[Array, Array]]:
    """Returns a linear map's result and what its gradients would be for that."""
    y, pull = jax.vjp(lambda x, weight: weight_product(x, weight, x.dtype, x.dtype), x, weight)
    return y, pull(y)
