"""A loaded model on other devices."""

from __future__ import annotations

import jax
from flax import nnx

from dsv3_jax.model import DeepSeekV3, abstract_model
from dsv3_jax.modules.devices import Devices


def on_devices(model: DeepSeekV3, devices: Devices) -> DeepSeekV3:
    """Returns the model with a copy of its weights on other devices, or the model itself if it is there already."""
    if model.devices == devices:
        return model
    options = {"precision": model.precision, "remat": model.remat, "attention": model.attention}
    moved = abstract_model(model.config, devices=devices, **options)
    state = nnx.state(model)
    nnx.update(moved, jax.device_put(state, devices.shardings(state)))
    return moved
