"""A model for generation whose large weights are in eight bits."""

from __future__ import annotations

import functools

import jax
from flax import nnx

from dsv3_jax.model import DeepSeekV3
from dsv3_jax.modules.embedding import Head
from dsv3_jax.modules.linear import Linear
from dsv3_jax.modules.moe import Experts
from dsv3_jax.precision.int8_weight import Int8Weight


def with_int8_weights(model: DeepSeekV3) -> DeepSeekV3:
    """Returns a copy of the model, for generation, with the weights of its products in int8.

    The embedding, norms and routers keep their dtype: they are read by rows or are small, and experts are chosen by
    small differences. So do the up-projections of keys and values, which decoding absorbs, and weights already in FP8.
    """
    copy = nnx.clone(model)
    for path, module in nnx.iter_modules(copy):
        if isinstance(module, Linear) and path[-1] != "kv_b":
            _replace(module.weight, module.in_axes)
        elif isinstance(module, Head):
            _replace(module.weight, 1)
        elif isinstance(module, Experts):
            _replace(module.gate_up, 1)
            _replace(module.down, 1)
    return copy


def _replace(parameter: nnx.Param, in_axes: int) -> None:
    value = parameter.get_value()
    if isinstance(value, jax.Array):
        parameter.set_value(_to_int8(value, in_axes))


@functools.partial(jax.jit, static_argnames=("in_axes",))
def _to_int8(weight: jax.Array, in_axes: int) -> Int8Weight:
    return Int8Weight.of(weight, in_axes)
