"""The default data and training settings of each preset."""

from __future__ import annotations

from typing import Any

from dsv3_jax.config import ModelConfig
from dsv3_jax.data import DataConfig
from dsv3_jax.training.config import RunConfig, TrainingConfig
from dsv3_jax.training.schedules import TrainingSchedule

# Differences from the report's schedule for a run of a few hundred steps: a longer warm-up than its 0.8% of the steps,
# and no growing batch. Some presets also change router biases faster: in 400 steps of 0.001 a bias can change by 0.4.
_SHORT = {
    "warmup_until": 0.05,
    "constant_until": 0.6,
    "ramp_until": 0.0,
    "ramp_from": 1.0,
}

_RUNS: dict[str, dict[str, dict[str, Any]]] = {
    "tiny": {
        "data": {"sequence_length": 64, "vocab_size": 320},
        "training": {"steps": 40, "batch_size": 4, "schedule": TrainingSchedule(learning_rate=3e-3, **_SHORT)},
    },
    "nano": {
        "data": {"sequence_length": 256, "vocab_size": 4096},
        "training": {
            "steps": 400,
            "evaluate_every": 100,
            "batch_size": 8,
            "optimizer": "muon",  # experiments/results/nano/recipes.json: 1.61 bits per byte; the best of AdamW: 1.71
            "schedule": TrainingSchedule(learning_rate=6e-3, bias_update_speed=0.003, **_SHORT),
        },
    },
    "mini": {
        "data": {"sequence_length": 512, "vocab_size": 8192},
        "training": {
            "steps": 3000,
            "batch_size": 16,
            "schedule": TrainingSchedule(learning_rate=1.5e-3, bias_update_speed=0.002, **_SHORT),
            "evaluate_every": 500,
        },
    },
    "1b": {
        "data": {"sequence_length": 2048, "vocab_size": 32768},
        "training": {
            "steps": 20000,
            "batch_size": 128,
            "micro_batch_size": 16,
            "schedule": TrainingSchedule(learning_rate=6e-4),
            "rematerialisation": "products",
            "evaluate_every": 1000,
            "checkpoint_every": 500,
        },
    },
}


def default_run(preset: str) -> RunConfig:
    """Returns the default run of a preset; presets without settings of their own use the report's schedule.

    Raises:
      ConfigError: there is no such preset.
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
