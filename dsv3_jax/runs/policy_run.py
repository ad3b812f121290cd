"""The configuration of a run of reinforcement learning, from that of the run whose weights it starts from."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from dsv3_jax.post_training.config import ReinforcementConfig
from dsv3_jax.runs.folder import RunFolder
from dsv3_jax.runs.starting_point import architecture_of_source, tokenizer_of_source
from dsv3_jax.training.config import LoraConfig, RunConfig, TeacherConfig
from dsv3_jax.training.defaults import default_run
from dsv3_jax.training.schedules import TrainingSchedule


def policy_run(
    source: Path,
    settings: ReinforcementConfig,
    *,
    learning_rate: float = 1e-4,
    warmup: float = 0.05,
    precision: str = "auto",
    **training: Any,
) -> RunConfig:
    """Returns the run of a policy that starts from a run, or from a checkpoint in the published layout.

    Architecture, data and optimizer are those of the run. The learning rate is constant after its warm-up, the weights
    are not averaged and do not decay, and a batch is the completions of one update.

    Args:
      source: folder of the run or checkpoint.
      learning_rate: peak learning rate.
      warmup: fraction of the steps in which it rises from 0.
      precision: float32, bfloat16, fp8 or auto, as of dsv3 train.
      training: changed fields of the TrainingConfig, such as `steps`.

    Raises:
      UserError: the folder is neither, or a value is impossible.
    """
    run = RunFolder(source)
    model = architecture_of_source(source)
    if run.holds_run:
        config = run.read_config()
    else:  # a preset with the optimizer of the report
        config = dataclasses.replace(default_run("mini"), model=model)
    constant = dict.fromkeys(("constant_until", "cosine_until", "final_until", "ramp_from"), 1.0)
    changes: dict[str, Any] = {
        "batch_size": settings.rows_per_update,
        "micro_batch_size": 0,
        "ema_decay": 0.0,
        "weight_decay": 0.0,
        "sample_tokens": 0,
        "schedule": TrainingSchedule(
            learning_rate=learning_rate, warmup_until=warmup, bias_update_speed=0.0, ramp_until=0.0, **constant
        ),
    }
    return dataclasses.replace(
        config,
        training=dataclasses.replace(config.training, **(changes | training)),
        data=dataclasses.replace(config.data, tokenizer=str(tokenizer_of_source(source))),
        precision=precision,
        lora=LoraConfig(),
        teacher=TeacherConfig(),
    )
