"""The train state, which a step maps to the next one, and its relation to a model."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from dsv3_jax.model import DeepSeekV3, router_biases, set_router_biases
from dsv3_jax.precision.fp8_weight import Fp8Weight
from dsv3_jax.training.adapters import Adapters, new_adapters, with_adapters
from dsv3_jax.training.config import LoraConfig, RunConfig
from dsv3_jax.training.optimizer import make_optimizer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """State of a run on the devices.

    Attributes:
      params: float32 master weights, and weights kept in FP8 (`Fp8Weight`), which no step changes.
      optimizer: the optimizer's moments and its count of steps.
      average: running average of the weights; None if none is kept.
      router_biases: float32 selection biases. They are not parameters: no optimizer ever sees them.
      key: random key of the run.
      step: int32, number of steps taken, those included that were not applied.
      adapters: low-rank adapters, which are trained instead of the parameters; None if the run has none.
      nonfinite_steps: int32, how many of the latest steps in a row had a loss or gradient that was not finite.
    """

    params: nnx.State
    optimizer: optax.OptState
    average: nnx.State | None
    router_biases: Float[Array, "layers E"]
    key: Key[Array, ""]
    step: Int[Array, ""]
    nonfinite_steps: Int[Array, ""]
    adapters: Adapters | None = dataclasses.field(default=None, kw_only=True)

    def weights(self, lora: LoraConfig) -> nnx.State:
        """Returns the parameters that evaluation uses: the running average if there is one, else with the adapters."""
        params: nnx.State = self.params if self.average is None else self.average
        return params if self.adapters is None else with_adapters(params, self.adapters, lora)


@dataclasses.dataclass(frozen=True)
class Skeleton:
    """A model without its parameters.

    Attributes:
      graph: structure of the model's modules.
      rest: its variables that are not parameters.
    """

    graph: Any
    rest: nnx.State

    def model(self, params: nnx.State, biases: Float[Array, "layers E"]) -> DeepSeekV3:
        """Returns the model with these parameters and router biases. The function is pure and may be called in jit."""
        rest = jax.tree.map(lambda leaf: leaf, self.rest)  # new Variables, which this trace may write to
        model = nnx.merge(self.graph, params, rest)
        set_router_biases(model, biases)
        return model


def split_trained(params: nnx.State) -> tuple[nnx.State, nnx.State]:
    """Returns the parameters that training changes, and the others: weights kept in FP8 as published.

    Only the first have gradients, optimizer state and a running average that differs. `nnx.merge_state` undoes it.
    """
    trained, kept = nnx.split_state(params, lambda path, variable: not isinstance(variable.get_value(), Fp8Weight), ...)
    return trained, kept


def split_model(model: DeepSeekV3) -> tuple[Skeleton, nnx.State, Float[Array, "layers E"]]:
    """Returns the skeleton, parameters and router biases of a model."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    if model.config.has_router_bias:
        biases = router_biases(model)
    else:
        biases = jnp.zeros((0, model.config.n_routed_experts), jnp.float32)
    return Skeleton(graph, rest), params, biases


def new_state(model: DeepSeekV3, config: RunConfig) -> tuple[Skeleton, TrainState]:
    """Returns the skeleton, and the state before the first step of a run that starts from `model`."""
    skeleton, params, biases = split_model(model)
    training, adapters = config.training, None
    if config.lora.rank:
        adapters = new_adapters(params, config.model, config.lora, jax.random.key(training.seed))
    trained = split_trained(params)[0] if adapters is None else adapters
    state = TrainState(
        params=params,
        optimizer=make_optimizer(training, config.moment_dtype, config.model).init(trained),
        average=jax.tree.map(jnp.copy, params) if training.ema_decay else None,
        router_biases=biases,
        key=jax.random.key(training.seed),
        step=jnp.zeros((), jnp.int32),
        nonfinite_steps=jnp.zeros((), jnp.int32),
        adapters=adapters,
    )
    return skeleton, state
