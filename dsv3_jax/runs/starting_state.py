"""The state of a new run, sharded over the run's devices."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
from flax import nnx

from dsv3_jax.model import DeepSeekV3
from dsv3_jax.modules.devices import Devices
from dsv3_jax.runs.checkpoints import abstract_state, make_model
from dsv3_jax.training.config import RunConfig
from dsv3_jax.training.state import Skeleton, TrainState, new_state, split_model
from dsv3_jax.training.state_layout import StateLayout


def distributed_model(config: RunConfig, layout: StateLayout) -> DeepSeekV3:
    """Returns a model with the run's initial weights for the layout's devices; to be traced where it is large."""
    return make_model(config, layout.devices)


def starting_state(
    config: RunConfig, layout: StateLayout, initial: Callable[[Devices], DeepSeekV3] | None = None
) -> tuple[Skeleton, TrainState]:
    """Returns the skeleton of the model and the state before the first step.

    No device ever holds more than its shard of the state. Random weights are the same on every layout.

    Args:
      initial: returns the model that the run starts from; its parameters are best on the devices that it is given
        already, and are copied there otherwise. Without it, the weights are drawn at random.
    """
    make = functools.partial(distributed_model, config, layout)
    if initial is None and layout.mesh is None:
        skeleton, params, _ = split_model(make())
        # One program makes the optimizer's state and the average. Outside it there would be one for every shape.
        state = jax.jit(_new_state_without(config, skeleton.graph, "params"))(params, skeleton.rest)
        return skeleton, dataclasses.replace(state, params=params)
    skeleton, _ = abstract_state(config, make)
    if initial is None:
        return skeleton, layout.make_state(lambda: new_state(make(), config)[1])
    graph, *arrays = nnx.split(initial(layout.devices), nnx.Param, ...)
    params, rest = jax.device_put(arrays, layout.devices.shardings(arrays))
    make_others = _new_state_without(config, graph, "params")
    shardings = layout.of_state(jax.eval_shape(make_others, params, rest))
    state = jax.jit(make_others, out_shardings=shardings)(params, rest)
    return skeleton, dataclasses.replace(state, params=params)


def untrained_state(model: DeepSeekV3, config: RunConfig) -> TrainState:
    """Returns the state of a run that only keeps the weights of a model, on one device. It has no optimizer state."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    state = jax.jit(_new_state_without(config, graph, "params", "optimizer"))(params, rest)
    return dataclasses.replace(state, params=params)


def _new_state_without(
    config: RunConfig, graph: nnx.GraphDef[DeepSeekV3], *fields: str
) -> Callable[[nnx.State, nnx.State], TrainState]:
    """Returns a function from a model's parameters and other arrays to its `new_state`, whose `fields` are None."""

    def make(params: nnx.State, rest: nnx.State) -> TrainState:
        state = new_state(nnx.merge(graph, params, rest), config)[1]
        return dataclasses.replace(state, **dict.fromkeys(fields))  # pyright: ignore[reportArgumentType]

    return make
