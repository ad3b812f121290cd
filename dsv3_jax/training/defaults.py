"""What each preset is trained with unless told otherwise."""

from __future__ import annotations

from typing import Any

from dsv3_jax.config import ModelConfig
from dsv3_jax.data import DataConfig
from dsv3_jax.training.config import RunConfig, TrainingConfig
from dsv3_jax.training.schedules import Schedule

# A run of a few hundred steps wants a longer warm-up than the report's 0.2%, no batch ramp, and a faster bias: in 0.001
# a step it could travel only a few tenths.
_SHORT = {
    "warmup_until": 0.05,
    "constant_until": 0.6,
    "ramp_until": 0.0,
    "ramp_from": 1.0,
}

_RUNS: dict[str, dict[str, dict[str, Any]]] = {
    "tiny": {
        "data": {"sequence_length": 64, "vocab_size": 320},
        "training": {"steps": 40, "batch_size": 4, "schedule": Schedule(learning_rate=3e-3, **_SHORT)},
    },
    "nano": {
        "data": {"sequence_length": 256, "vocab_size": 4096},
        "training": {
            "steps": 400,
            "evaluate_every": 100,
            "batch_size": 8,
            "schedule": Schedule(learning_rate=3e-3, bias_update_speed=0.003, **_SHORT),
        },
    },
    "mini": {
        "data": {"sequence_length": 512, "vocab_size": 8192},
        "training": {
            "steps": 3000,
            "batch_size": 16,
            "schedule": Schedule(learning_rate=1.5e-3, bias_update_speed=0.002, **_SHORT),
            "evaluate_every": 500,
        },
    },
    "1b": {
        "data": {"sequence_length": 2048, "vocab_size": 32768},
        "training": {
            "steps": 20000,
            "batch_size": 128,
            "micro_batch_size": 16,
            "schedule": Schedule(learning_rate=6e-4),
            "rematerialisation": "products",
            "evaluate_every": 1000,
            "checkpoint_every": 500,
        },
    },
}


def default_run(preset: str) -> RunConfig:
    """The default run of a preset: the report's own schedule where the preset has none of its own.

    Raises:
      ConfigError: unknown preset.
    """
    model = ModelConfig.preset(preset)
    run = _RUNS.get(preset, {})
    data: dict[str, Any] = {"sequence_length": min(4096, model.max_position_embeddings), "vocab_size": model.vocab_size}
    training: dict[str, Any] = {"batch_size": 256, "steps": 100_000, "rematerialisation": "report"}
    return RunConfig(
        preset=preset,
        model=model,
        data=DataConfig(**(run.get("data") or data)),
        training=TrainingConfig(**(run.get("training") or training)),
    )
