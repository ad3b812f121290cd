"""DeepSeek-V3 in JAX: the public names.

    import dsv3_jax as dsv3

    cfg = dsv3.ModelConfig.preset("nano")        # dsv3.presets() lists the names
    model = dsv3.DeepSeekV3(cfg, rngs=nnx.Rngs(0))
    out = model(tokens)                          # out.logits, out.mtp_logits, out.routing
    dsv3.generate(model, tokens, max_new_tokens=64)

    dsv3.train(dsv3.default_run("nano"))         # into runs/nano, as `dsv3 train` does
    model, tokenizer, step = dsv3.load_checkpoint("runs/nano")
    dsv3.load_hf(folder); dsv3.save_hf(model, folder)

A name is imported on first use, so that a command that only parses its arguments starts at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dsv3_jax.config import ModelConfig, RopeScaling
    from dsv3_jax.data import DataConfig, Tokenizer, prepare_data
    from dsv3_jax.errors import ConfigError, UserError
    from dsv3_jax.inference.generate import generate
    from dsv3_jax.inference.sampling import Sampler
    from dsv3_jax.interop import load_hf, save_hf
    from dsv3_jax.model import DeepSeekV3, ModelOutput, router_biases, set_router_biases
    from dsv3_jax.model_presets import presets
    from dsv3_jax.modules.devices import OneDevice
    from dsv3_jax.precision import Precision
    from dsv3_jax.runs.checkpoints import load_checkpoint
    from dsv3_jax.runs.loop import train
    from dsv3_jax.training.defaults import default_run

_HOMES = {
    "ConfigError": "dsv3_jax.errors",
    "DataConfig": "dsv3_jax.data",
    "DeepSeekV3": "dsv3_jax.model",
    "ModelConfig": "dsv3_jax.config",
    "ModelOutput": "dsv3_jax.model",
    "OneDevice": "dsv3_jax.modules.devices",
    "Precision": "dsv3_jax.precision",
    "RopeScaling": "dsv3_jax.config",
    "Sampler": "dsv3_jax.inference.sampling",
    "Tokenizer": "dsv3_jax.data",
    "UserError": "dsv3_jax.errors",
    "default_run": "dsv3_jax.training.defaults",
    "generate": "dsv3_jax.inference.generate",
    "load_checkpoint": "dsv3_jax.runs.checkpoints",
    "load_hf": "dsv3_jax.interop",
    "prepare_data": "dsv3_jax.data",
    "presets": "dsv3_jax.model_presets",
    "router_biases": "dsv3_jax.model",
    "save_hf": "dsv3_jax.interop",
    "set_router_biases": "dsv3_jax.model",
    "train": "dsv3_jax.runs.loop",
}

__all__ = [
    "ConfigError",
    "DataConfig",
    "DeepSeekV3",
    "ModelConfig",
    "ModelOutput",
    "OneDevice",
    "Precision",
    "RopeScaling",
    "Sampler",
    "Tokenizer",
    "UserError",
    "default_run",
    "generate",
    "load_checkpoint",
    "load_hf",
    "prepare_data",
    "presets",
    "router_biases",
    "save_hf",
    "set_router_biases",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dsv3_jax' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
