"""Redundant experts of an engine, placed by the load that the engine measures (report section 3.4)."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from flax import nnx

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
