"""The state of a new run, laid out."""

from __future__ import annotations

import functools
from collections.abc import Callable

from dsv3_jax.model import DeepSeekV3
from dsv3_jax.runs.checkpoints import abstract_state, make_model
from dsv3_jax.training.config import RunConfig
from dsv3_jax.training.state import Skeleton, TrainState, new_state
from dsv3_jax.training.state_layout import StateLayout


def distributed_model(config: RunConfig, layout: StateLayout) -> DeepSeekV3:
    """Returns a model with the run's initial weights for the layout's devices; to be traced where it is large."""
    return make_model(config, layout.devices)


def starting_state(
    config: RunConfig, layout: StateLayout, initial: Callable[[], DeepSeekV3] | None = None
) -> tuple[Skeleton, TrainState]:
    """Skeleton and state before the first step.

    Args:
      initial: makes the model that the run starts from, whole on every process; without it the weights are drawn where
        they lie, and are the same on every layout.
    """
    make = functools.partial(distributed_model, config, layout)
    if initial is not None:
        skeleton, _ = abstract_state(config, make)
        _, state = new_state(initial(), config)
        return skeleton, layout.put_state(state)
    if layout.mesh is None:
        return new_state(make(), config)
    skeleton, _ = abstract_state(config, make)
    return skeleton, layout.make_state(lambda: new_state(make(), config)[1])
