"""A model for generation on a CPU: the weights of its products in eight bits, or in tiles."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from dsv3_jax.model import DeepSeekV3
from dsv3_jax.modules.devices import OneDevice
from dsv3_jax.modules.embedding import Head
from dsv3_jax.modules.linear import Linear
from dsv3_jax.modules.moe import Experts
from dsv3_jax.modules.router import Router
from dsv3_jax.precision.int8_weight import Int8Weight
from dsv3_jax.precision.tiled_weight import TiledWeight
from pallas_kernels.device import target_platform


def with_int8_weights(model: DeepSeekV3) -> DeepSeekV3:
    """Returns a copy of the model, for generation, with the weights of its products in int8.

    The embedding, norms and routers keep their dtype: they are read by rows or are small, and experts are chosen by
    small differences. So do the up-projections of keys and values, which decoding absorbs, and weights already in FP8.
    """
    copy = nnx.clone(model)
    for parameter, in_axes, _ in _products(copy):
        if isinstance(parameter.get_value(), jax.Array):
            parameter.set_value(_to_int8(parameter.get_value(), in_axes))
    return copy


def with_tiled_weights(model: DeepSeekV3, *, drafts: bool) -> DeepSeekV3:
    """Returns a copy of the model, for generation, with the weights of its products and routers in tiles.

    Args:
      drafts: whether MTP modules are used. The head then has its weight in int8 too, as all products of the modules
        are: drafts need not be exact, since the main model checks them.
    """
    copy = nnx.clone(model)
    rounded = _to_int8(copy.head.weight[...], 1) if drafts else None
    for parameter, in_axes, _ in _products(copy.mtp):
        parameter.set_value(_to_int8(parameter.get_value(), in_axes))
    routers = (module for _, module in nnx.iter_modules(copy) if isinstance(module, Router))
    of_routers = [(router.weight, 1, 2) for router in routers]
    for parameter, in_axes, matrix_axes in [*_products(copy), *of_routers]:
        value = parameter.get_value()
        if isinstance(value, jax.Array):
            parameter.set_value(_to_tiles(value, in_axes, value.ndim - matrix_axes))
    head = copy.head.weight
    head.set_value(dataclasses.replace(head[...], rounded=rounded))
    return copy


def gains_from_tiles(model: DeepSeekV3) -> bool:
    """Returns whether tiles make decoding faster and exact: in float32 on one CPU, with weights that are arrays."""
    on_cpu = isinstance(model.devices, OneDevice) and target_platform() == "cpu"
    plain = all(isinstance(parameter.get_value(), jax.Array) for parameter, *_ in _products(model))
    return on_cpu and plain and model.precision.fp8 is None and model.precision.dtype == jnp.float32


def _products(model: nnx.Module) -> Iterator[tuple[nnx.Param, int, int]]:
    """Yields the weights of products that decoding does not absorb: each with the number of its input axes, and the
    number of all its axes but those of layers and experts.
    """
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Linear) and path[-1] != "kv_b":
            yield module.weight, module.in_axes, len(module.shape.shape)
        elif isinstance(module, Head):
            yield module.weight, 1, 2
        elif isinstance(module, Experts):
            yield module.gate_up, 1, 3
            yield module.down, 1, 2


@functools.partial(jax.jit, static_argnames=("in_axes",))
def _to_int8(weight: jax.Array, in_axes: int) -> Int8Weight:
    return Int8Weight.of(weight, in_axes)


@functools.partial(jax.jit, static_argnames=("in_axes", "stack_axes"))
def _to_tiles(weight: jax.Array, in_axes: int, stack_axes: int) -> TiledWeight:
    return TiledWeight.of(weight.astype(jnp.float32), in_axes, stack_axes)
