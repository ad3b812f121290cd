"""Reads a model's arrays by dotted path, and makes a model from such arrays without initialising weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from dsv3_jax.model import DeepSeekV3
from dsv3_jax.modules.router import RouterBias

_WEIGHTS = (nnx.Param, RouterBias)


def arrays(model: DeepSeekV3) -> dict[str, Any]:
    """Returns parameters and router biases by path, such as `moe_blocks.feed_forward.experts.gate_up`."""
    return _by_path(nnx.state(model, _WEIGHTS))


def shardings(model: DeepSeekV3) -> dict[str, jax.sharding.Sharding]:
    """Returns where the model's devices keep each of its `arrays`, by path."""
    return _by_path(model.devices.shardings(nnx.state(model, _WEIGHTS)))


def with_arrays(model: DeepSeekV3, values: Mapping[str, Any]) -> DeepSeekV3:
    """Returns `model` with the arrays of `values`, which must have every path of `arrays`; nothing is copied."""
    graph, weights, rest = nnx.split(model, _WEIGHTS, ...)
    flat = [(path, variable.replace(values[".".join(map(str, path))])) for path, variable in nnx.to_flat_state(weights)]
    return nnx.merge(graph, nnx.from_flat_state(flat), rest)


def nbytes(model: DeepSeekV3) -> int:
    """Returns the bytes of all weights."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays(model)))


def _by_path(state: nnx.State) -> dict[str, Any]:
    return {".".join(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(state)}
