"""The configuration of reinforcement learning beside that of the run: rollouts, objective and their repetition."""

from __future__ import annotations

import dataclasses
from typing import Any

from dsv3_jax.bounds import LARGEST_COUNT, check_bounds
from dsv3_jax.errors import ConfigError
from dsv3_jax.post_training.grpo import GRPOConfig
from dsv3_jax.post_training.rewards import JudgeConfig
from dsv3_jax.post_training.rollouts import RolloutConfig
from dsv3_jax.post_training.tasks import TaskSize


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReinforcementConfig:
    """How a policy is trained by reward.

    Attributes:
      rollout: what is asked and how completions are drawn.
      objective: the objective.
      epochs: how often a rollout is read.
      minibatches: optimizer steps of an epoch; each takes an equal share of the groups.
      replay_experts: whether the trainer uses the experts that the engine chose for every token.
      one_step_behind: whether the completions of the next step are drawn while this step's update is computed, from the
        policy before it.
      reference_every: steps after which the reference is replaced by the policy; 0 for never. R1-Zero used 400.
      held_out: problems that the policy is tested on.
    """

    rollout: RolloutConfig = dataclasses.field(default_factory=RolloutConfig)
    objective: GRPOConfig = dataclasses.field(default_factory=GRPOConfig)
    epochs: int = 1
    minibatches: int = 1
    replay_experts: bool = False
    one_step_behind: bool = False
    reference_every: int = 0
    held_out: int = 64

    def __post_init__(self) -> None:
        bounds = {"epochs": (1, 1000), "minibatches": (1, LARGEST_COUNT), "held_out": (1, LARGEST_COUNT)}
        check_bounds(self, bounds | {"reference_every": (0, LARGEST_COUNT)})
        if self.rollout.prompts % self.minibatches:
            raise ConfigError(f"minibatches ({self.minibatches}) must divide prompts ({self.rollout.prompts})")
        if self.reference_every and not self.objective.kl_weight:
            raise ConfigError("reference_every needs a reference, which there is with kl_weight above 0 alone")
        if self.one_step_behind and not self.objective.largest_correction:
            raise ConfigError(
                "one_step_behind draws from an older policy, which largest_correction must allow for: give 2, say"
            )

    @property
    def updates(self) -> int:
        """Number of optimizer steps of a rollout."""
        return self.epochs * self.minibatches

    @property
    def rows_per_update(self) -> int:
        """Number of completions of an optimizer step."""
        return self.rollout.prompts * self.rollout.group // self.minibatches

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as nested dictionaries of plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ReinforcementConfig:
        """Makes a configuration from what `to_dict` returns.

        Raises:
          ConfigError: a field is missing, unknown or wrong.
        """
        try:
            rollout = dict(values["rollout"])
            rollout["size"] = TaskSize(**rollout["size"])
            rollout["judge"] = JudgeConfig(**rollout.get("judge", {}))
            parts = {"rollout": RolloutConfig(**rollout), "objective": GRPOConfig(**values["objective"])}
            return cls(**(values | parts))
        except (KeyError, TypeError) as error:
            raise ConfigError(f"the settings of reinforcement learning cannot be read: {error}") from error
