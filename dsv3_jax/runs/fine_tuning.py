"""The settings of a supervised fine-tuning run, which the report describes in section 5.1."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from dsv3_jax.data import DataConfig
from dsv3_jax.runs.folder import RunFolder
from dsv3_jax.runs.starting_point import architecture_of_source, tokenizer_of_source
from dsv3_jax.training.config import LoraConfig, RunConfig, TeacherConfig, TrainingConfig
from dsv3_jax.training.schedules import TrainingSchedule

EPOCHS = 2.0
"""Passes over the data (report section 5.1)."""

_LOSS_ON = {"assistant": "the assistant's turns", "last": "the assistant's last turn", "all": "all tokens"}
_REPORT_PEAK = 5e-6  # of the learning rate, section 5.1; its cosine decay ends at 1e-6
_REPORT_END = 1e-6
_LATE_MTP_WEIGHT = TrainingSchedule().mtp_weight_after  # lambda at the end of pre-training


def default_fine_tuning(source: Path, data: str) -> RunConfig:
    """Returns the default run that fine-tunes the model of a run or of a published checkpoint on conversations.

    Args:
      source: folder of the model.
      data: file or folder of conversations.

    Raises:
      UserError: the source is neither a run nor a checkpoint, or has no tokenizer.
    """
    model = architecture_of_source(source)
    if RunFolder(source).checkpoints.is_dir():
        run = RunFolder(source).read_config()
    else:
        length = min(4096, model.max_position_embeddings)
        training = TrainingConfig(batch_size=32, micro_batch_size=8, rematerialisation="report")
        run = RunConfig(preset=source.name, model=model, data=DataConfig(sequence_length=length), training=training)
    return fine_tuning_of(run, data, str(tokenizer_of_source(source)))


def fine_tuning_of(run: RunConfig, data: str, tokenizer: str) -> RunConfig:
    """Returns the run that fine-tunes the model which another run has trained.

    The learning rate is the report's, which falls by a cosine from 5e-6 to 1e-6, for a model that was pre-trained with
    the report's 2.2e-4; for other runs it is as much smaller or larger as theirs was. Router biases do not move, no
    weight decays, and no running average of the weights is kept. The report gives none of these three.

    Args:
      data: file or folder of conversations.
      tokenizer: path of the tokenizer of the weights, or "byte".
    """
    schedule = dataclasses.replace(
        run.training.schedule,
        learning_rate=_REPORT_PEAK * run.training.schedule.learning_rate / TrainingSchedule().learning_rate,
        warmup_until=0.0,
        constant_until=0.0,
        cosine_until=1.0,
        cosine_to=_REPORT_END / _REPORT_PEAK,
        final_until=1.0,
        ramp_until=0.0,
        ramp_from=1.0,
        bias_update_speed=0.0,
        bias_update_until=1.0,
        mtp_weight=_LATE_MTP_WEIGHT,
        mtp_weight_after=_LATE_MTP_WEIGHT,
    )
    of_rows = {"form": "conversations", "isolate_documents": True, "fill_in_middle_rate": 0.0}
    return dataclasses.replace(
        run,
        data=dataclasses.replace(run.data, corpus=data, tokenizer=tokenizer, punctuation_split_rate=0.0, **of_rows),
        lora=LoraConfig(),
        teacher=TeacherConfig(),
        training=dataclasses.replace(
            run.training, steps=1, schedule=schedule, weight_decay=0.0, ema_decay=0.0, evaluate_every=0
        ),
    )


def default_reward_model(source: Path, data: str) -> RunConfig:
    """Returns the default run that trains a reward model from a run or a published checkpoint.

    Its schedules are those of fine-tuning, for one epoch. MTP modules are not trained.

    Args:
      source: folder of the model.
      data: file or folder of preference pairs.

    Raises:
      UserError: the source is neither a run nor a checkpoint, or has no tokenizer.
    """
    run = default_fine_tuning(source, data)
    return dataclasses.replace(
        run,
        data=dataclasses.replace(run.data, form="preferences"),
        training=dataclasses.replace(run.training, sample_tokens=0),
    )


def moving_bias_speed(source: Path) -> float:
    """Returns gamma of the run that trained a model; the report's where that is not known."""
    speed = 0.0
    if RunFolder(source).checkpoints.is_dir():
        speed = RunFolder(source).read_config().training.schedule.bias_update_speed
    return speed or TrainingSchedule().bias_update_speed


def describe_fine_tuning(config: RunConfig) -> str:
    """Returns a line that says what a fine-tuning run trains."""
    speed, mtp = config.training.schedule.bias_update_speed, config.training.schedule.mtp_weight
    parts = [
        f"loss on {_LOSS_ON[config.data.loss_on]}",
        f"MTP loss with weight {mtp:g}" if mtp and config.model.num_nextn_predict_layers else "no MTP loss",
        f"balance loss: {config.training.balance}",
        f"router biases move by {speed:g} a step" if speed else "router biases are frozen",
    ]
    if config.lora.rank:
        experts = " (experts too)" if config.lora.experts else ""
        parts.append(f"only adapters of rank {config.lora.rank} of {config.lora.targets}{experts} are trained")
    if config.teacher.run:
        parts.append(f"{config.teacher.weight:g} of the loss is the divergence from {config.teacher.run}")
    return "fine-tuning: " + "; ".join(parts)
