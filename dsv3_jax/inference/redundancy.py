"""The model as an engine computes with it: redundant experts by measured load (report section 3.4), int8 or tiles."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from flax import nnx

from dsv3_jax.errors import ConfigError
from dsv3_jax.inference.engine_config import EngineConfig
from dsv3_jax.inference.product_weights import for_one_cpu, with_int8_weights
from dsv3_jax.model import DeepSeekV3
from dsv3_jax.sharding.placed_experts import with_placed_experts
from dsv3_jax.sharding.placement import place_experts


def with_redundant_experts(model: DeepSeekV3, redundant: int, load: np.ndarray | None) -> DeepSeekV3:
    """Returns a copy of the model with `redundant` more experts in each layer, which computes the same.

    All copies of a model have arrays of the same shapes, so that one replaces another without compiling.

    Args:
      load: tokens that chose each expert, of the MoE layers and then of MTP blocks; layers without a row, or all
        layers with None, are placed as if the load were even.

    Raises:
      ConfigError: the experts cannot be divided equally over the devices.
    """
    config = model.config
    whole = np.ones((config.num_moe_layers + config.num_nextn_predict_layers, config.n_routed_experts))
    if load is not None:
        whole[: len(load)] = load
    experts = config.n_routed_experts
    placement = place_experts(whole, physical=experts + redundant, devices=model.devices.expert_ranks)
    missing = 1 + redundant - placement.copies.shape[-1]
    copies = np.pad(placement.copies, ((0, 0), (0, 0), (0, missing)), constant_values=-1)
    placed = with_placed_experts(model, dataclasses.replace(placement, copies=copies))
    state = nnx.state(placed)
    nnx.update(placed, jax.device_put(state, model.devices.shardings(state)))
    return placed


class OwnModel:
    """Returns models as one set of devices computes with them, and remembers the load that its copies were chosen by.

    Args:
      config: says how many copies of experts there are, and whether weights are kept in int8 or in tiles.
    """

    def __init__(self, config: EngineConfig):
        self._config = config
        self._model: DeepSeekV3 | None = None
        self._counted: np.ndarray | int = 0  # the load at the last placement

    def __call__(self, model: DeepSeekV3, load: np.ndarray | None = None) -> DeepSeekV3:
        """Returns the model with copies of experts, and weights in int8 or tiles, where the settings ask for them.

        Args:
          load: tokens that chose each expert since the engine started; None before any request.

        Raises:
          ConfigError: the settings do not fit the model.
        """
        if self._config.redundant_experts:
            since = None if load is None else load - self._counted
            self._model, self._counted = model, 0 if load is None else load
            model = with_redundant_experts(model, self._config.redundant_experts, since)
        if not self._config.int8_weights:
            tiled = self._config.tiled_weights and not self._config.redundant_experts
            return for_one_cpu(model, drafts=self._config.drafts != 0) if tiled else model
        if model.precision.fp8 is not None:
            raise ConfigError("engine.int8_weights is for models of precision float32 or bfloat16, not fp8")
        return with_int8_weights(model)

    def placed_again(self, weights: nnx.State, load: np.ndarray) -> nnx.State:
        """Returns the weights with copies of the experts that served most tokens since the last placement.

        Without copies they stay as they are. The new ones compute what the old ones do: running requests and the cache
        need not change.
        """
        return weights if self._model is None else nnx.state(self(self._model, load))
