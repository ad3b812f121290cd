"""A model for generation on a CPU: the weights of its products in eight bits or in tiles, its experts divided."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from dsv3_jax.model import DeepSeekV3
from dsv3_jax.modules.devices import OneDevice
from dsv3_jax.modules.embedding import Head
from dsv3_jax.modules.latent_attention import LatentAttention
from dsv3_jax.modules.linear import Linear
from dsv3_jax.modules.moe import Experts
from dsv3_jax.modules.router import Router
from dsv3_jax.precision.by_layer import ByLayer
from dsv3_jax.precision.int8_weight import Int8Weight, WithRounded
from dsv3_jax.precision.tiled_weight import AbsorbedWeight, TiledWeight
from pallas_kernels.device import target_platform


def with_int8_weights(model: DeepSeekV3) -> DeepSeekV3:
    """Returns a copy of the model, for generation, with the weights of its products in int8.

    The embedding, norms and routers keep their dtype: they are read by rows or are small, and experts are chosen by
    small differences. So do the up-projections of keys and values, which decoding absorbs, and weights already in FP8.
    On one CPU routers and those up-projections are in float32 tiles, so that a single row needs no second one below it.
    """
    copy = nnx.clone(model)
    for parameter, in_axes, _ in _products(copy):
        if isinstance(parameter.get_value(), jax.Array):
            parameter.set_value(_to_int8(parameter.get_value(), in_axes))
    if _on_one_cpu(copy) and copy.precision.fp8 is None:
        _put_into_tiles(_routers(copy))
        _absorb_in_tiles(copy)
        _divide_experts(copy)
    return copy


def for_one_cpu(model: DeepSeekV3, *, drafts: bool) -> DeepSeekV3:
    """Returns a copy in the form that one CPU decodes fastest.

    In float32 it has the weights of products and routers in tiles. In other dtypes they stay arrays, but the experts of
    each layer get their own. A model on other devices, or with weights in formats of their own, is returned as it is.

    Args:
      drafts: whether MTP modules are used. The head then has its weight in int8 too, as all products of the modules
        are: drafts need not be exact, since the main model checks them.
    """
    plain = all(isinstance(parameter.get_value(), jax.Array) for parameter, *_ in _products(model))
    if not (_on_one_cpu(model) and plain and model.precision.fp8 is None):
        return model
    copy = nnx.clone(model)
    head = copy.head.weight
    rounded = _to_int8(head[...], 1) if drafts else None
    for parameter, in_axes, _ in _products(copy.mtp):
        parameter.set_value(_to_int8(parameter.get_value(), in_axes))
    if model.precision.dtype == jnp.float32:
        _put_into_tiles([*_products(copy), *_routers(copy)])
        _absorb_in_tiles(copy)
    _divide_experts(copy)
    if rounded is not None:
        head.set_value(WithRounded(head[...], rounded))
    return copy


def _on_one_cpu(model: DeepSeekV3) -> bool:
    return isinstance(model.devices, OneDevice) and target_platform() == "cpu"


def _put_into_tiles(weights: Iterable[tuple[nnx.Param, int, int]]) -> None:
    """Puts those of `weights` that are arrays into tiles; each comes as from `_products`."""
    for parameter, in_axes, matrix_axes in weights:
        value = parameter.get_value()
        if isinstance(value, jax.Array):
            parameter.set_value(_to_tiles(value, in_axes, value.ndim - matrix_axes))


def _absorb_in_tiles(model: DeepSeekV3) -> None:
    """Puts the up-projections of keys and values into tiles, as decoding absorbs them."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, LatentAttention):
            up = module.kv_b.weight
            up.set_value(_to_absorbed(up.get_value(), module.config.qk_nope_head_dim))


def _divide_experts(model: DeepSeekV3) -> None:
    """Gives every main layer's experts arrays of their own, if one array holds those of all layers."""
    for _, experts in nnx.iter_modules(model):
        if isinstance(experts, Experts) and experts.gate_up.get_value().ndim > len(experts.shapes.gate_up.shape):
            for parameter in (experts.gate_up, experts.down):
                parameter.set_value(_by_layer(parameter.get_value()))


_by_layer = jax.jit(ByLayer.of)


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


def _routers(model: nnx.Module) -> Iterator[tuple[nnx.Param, int, int]]:
    """Yields the weights of routers, as `_products` does those of products."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Router):
            yield module.weight, 1, 2


@functools.partial(jax.jit, static_argnames=("in_axes",))
def _to_int8(weight: jax.Array, in_axes: int) -> Int8Weight:
    return Int8Weight.of(weight, in_axes)


@functools.partial(jax.jit, static_argnames=("in_axes", "stack_axes"))
def _to_tiles(weight: jax.Array, in_axes: int, stack_axes: int) -> TiledWeight:
    return TiledWeight.of(weight.astype(jnp.float32), in_axes, stack_axes)


@functools.partial(jax.jit, static_argnames=("keys",))
def _to_absorbed(weight: jax.Array, keys: int) -> AbsorbedWeight:
    return AbsorbedWeight.of(weight.astype(jnp.float32), keys)
