"""Loads the models that a reward names: reward models and judges."""

from __future__ import annotations

import functools
from pathlib import Path

from dsv3_jax.data import Tokenizer
from dsv3_jax.errors import UserError
from dsv3_jax.inference import Engine, EngineConfig
from dsv3_jax.post_training.judging import Judge
from dsv3_jax.post_training.reward_model import RewardModel
from dsv3_jax.post_training.rewards import JudgeConfig, ModelReward, Reward
from dsv3_jax.runs.checkpoints import load_run

_MOST_SEQUENCES = 64  # that a judge's engine writes at a time


def with_loaded_models(
    reward: Reward | None, judge: JudgeConfig, engine: Engine, tokenizer: Tokenizer
) -> Reward | None:
    """Returns the reward with its models loaded, on one device.

    Args:
      judge: how judges vote.
      engine, tokenizer: those of the model that writes the completions, which judges them in "judge:self".

    Raises:
      UserError: a folder holds no run, or "model:FOLDER" no reward model.
    """
    return reward and reward.with_models(functools.partial(_load, judge=judge, engine=engine, tokenizer=tokenizer))


def _load(name: str, *, judge: JudgeConfig, engine: Engine, tokenizer: Tokenizer) -> ModelReward:
    kind, _, folder = name.partition(":")
    if kind == "judge" and folder == "self":
        return Judge(engine, tokenizer, judge.constitution, judge.votes)
    if kind == "model":
        return load_reward_model(Path(folder))
    loaded = load_run(Path(folder))
    own = Engine(loaded.model, EngineConfig(max_sequences=_MOST_SEQUENCES))
    return Judge(own, loaded.saved.tokenizer, judge.constitution, judge.votes)


def load_reward_model(folder: Path) -> RewardModel:
    """Returns the reward model that a run has trained, on one device.

    Raises:
      UserError: the folder holds no reward model.
    """
    loaded = load_run(folder)
    if loaded.saved.config.data.form != "preferences":
        raise UserError(f"{folder} holds no reward model; dsv3 reward-model trains one")
    return RewardModel(loaded.model, loaded.saved.tokenizer)
