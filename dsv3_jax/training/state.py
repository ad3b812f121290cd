"""All that a training step reads and changes, as one pytree of arrays."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, Key, PyTree

from dsv3_jax.model import DeepSeekV3, router_biases, set_router_biases
from dsv3_jax.training.token_count import TokenCount, token_count


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything from which a run goes on exactly, but the data iterator.

    Attributes:
      params: the model's parameters, float32, nested dictionaries named as in the parameter tree.
      optimizer: AdamW's moments.
      average: exponential moving average of `params`; None when none is kept.
      router_biases: selection biases, moved by balancing and not by gradients.
      step: steps taken, those not applied included.
      tokens: tokens read, exactly.
      key: constant; a step that needs randomness folds `step` into it.
      consecutive_nonfinite: steps in a row, up to now, that were not applied.
    """

    params: PyTree[Float[Array, "..."]]
    optimizer: optax.OptState
    average: PyTree[Float[Array, "..."]] | None
    router_biases: Float[Array, "layers E"]
    step: Int[Array, ""]
    tokens: TokenCount
    key: Key[Array, ""]
    consecutive_nonfinite: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class ModelTemplate:
    """A model without its arrays: turns parameters and biases back into a model, inside jit or outside."""

    graph: nnx.GraphDef[DeepSeekV3]
    biases: Any  # nnx.State of shapes: where the router biases sit in the tree

    def model(self, params: PyTree[Array], biases: Float[Array, "layers E"]) -> DeepSeekV3:
        """The model with these arrays."""
        empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self.biases)
        model = nnx.merge(self.graph, nnx.State(jax.tree.map(nnx.Param, params)), empty)
        if model.config.has_router_bias:
            set_router_biases(model, biases)
        return model


def split_model(model: DeepSeekV3) -> tuple[ModelTemplate, PyTree[Array], Float[Array, "layers E"]]:
    """A model as template, parameters and router biases ([0, E] for models that select without)."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), rest)
    config = model.config
    biases = router_biases(model) if config.has_router_bias else jnp.zeros((0, config.n_routed_experts))
    return ModelTemplate(graph, shapes), nnx.to_pure_dict(params), biases


def initial_state(
    params: PyTree[Array],
    biases: Float[Array, "layers E"],
    optimizer: optax.GradientTransformation,
    *,
    key: Key[Array, ""],
    keep_average: bool,
) -> TrainState:
    """The state before the first step."""
    return TrainState(
        params=params,
        optimizer=optimizer.init(params),
        average=jax.tree.map(jnp.copy, params) if keep_average else None,
        router_biases=biases,
        step=jnp.zeros((), jnp.int32),
        tokens=token_count(0),
        key=key,
        consecutive_nonfinite=jnp.zeros((), jnp.int32),
    )
