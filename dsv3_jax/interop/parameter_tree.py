"""A model's arrays by dotted path, and a model from such arrays, without ever initialising weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from dsv3_jax.config import ModelConfig
from dsv3_jax.model import DeepSeekV3
from dsv3_jax.modules.router import RouterBias
from dsv3_jax.precision import PRECISIONS, Precision

_WEIGHTS = (nnx.Param, RouterBias)


def abstract_model(
    config: ModelConfig, *, precision: Precision = PRECISIONS["float32"], remat: str = "none"
) -> DeepSeekV3:
    """A model whose arrays are shapes and dtypes only."""
    return nnx.eval_shape(lambda: DeepSeekV3(config, rngs=nnx.Rngs(0), precision=precision, remat=remat))


def arrays(model: DeepSeekV3) -> dict[str, Any]:
    """Parameters and router biases by path, such as `moe_blocks.feed_forward.experts.gate_up`."""
    state = nnx.to_flat_state(nnx.state(model, _WEIGHTS))
    return {".".join(map(str, path)): variable.get_value() for path, variable in state}


def with_arrays(model: DeepSeekV3, values: Mapping[str, Any]) -> DeepSeekV3:
    """`model` with the arrays of `values`, which must have every path of `arrays`; nothing is copied."""
    graph, weights, rest = nnx.split(model, _WEIGHTS, ...)
    flat = [(path, variable.replace(values[".".join(map(str, path))])) for path, variable in nnx.to_flat_state(weights)]
    return nnx.merge(graph, nnx.from_flat_state(flat), rest)


def nbytes(model: DeepSeekV3) -> int:
    """Bytes of all weights."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays(model)))
