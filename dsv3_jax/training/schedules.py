"""The schedules of section 4.2 of the report: learning rate, batch size, and the weights of bias update and losses.

Every schedule is piecewise in the tokens seen, except that the warm-up of the learning rate is counted in steps. Phases
end at fractions of the run's tokens or steps, so that the same schedule can be used for a run of any length. The
defaults are those of the report's run of 14.8T tokens.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

from dsv3_jax.errors import ConfigError

REPORT_TOKENS = 14.8e12
"""Number of tokens of the report's run."""
REPORT_STEPS = 242_783
"""Number of steps of the report's run, if its batch size grows linearly in the tokens and in single sequences."""


_LARGEST_VALUE = 1e6


def _fraction(tokens: float) -> float:
    return tokens / REPORT_TOKENS


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduledValues:
    """The values of all schedules at one step.

    Attributes:
      learning_rate: of AdamW.
      batch_size: sequences of the step.
      bias_update_speed: gamma, the change of a router bias per step.
      balance_weight: alpha, the weight of the auxiliary balance loss.
      mtp_weight: lambda, the weight of the MTP loss.
    """

    learning_rate: float
    batch_size: int
    bias_update_speed: float
    balance_weight: float
    mtp_weight: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingSchedule:
    """The phases of a run. Every `*_until` is a fraction, from 0 to 1: of the run's steps for the warm-up, else tokens.

    Attributes:
      learning_rate: peak learning rate.
      warmup_until: fraction (0 to 1) of the run's steps at which the linear warm-up of the learning rate from 0 ends
        (the report: 2,000 steps).
      constant_until: fraction (0 to 1) of the run's tokens at which the peak learning rate ends and the cosine decay
        starts.
      cosine_until: fraction (0 to 1) of the run's tokens at which the cosine decay ends.
      cosine_to: learning rate at the end of the cosine decay, as a fraction of the peak (the report: 2.2e-5 absolute).
      final_until: fraction (0 to 1) of the run's tokens until which the learning rate stays at `cosine_to`.
      last_rate: learning rate for the rest of the run, as a fraction of the peak (the report: 7.3e-6 absolute).
      ramp_until: fraction (0 to 1) of the run's tokens at which the batch size stops growing.
      ramp_from: batch size at the start, as a fraction of the full batch (the report: 3,072 of 15,360 sequences).
      bias_update_speed: gamma, by how much a router bias changes per step.
      bias_update_until: fraction (0 to 1) of the run's tokens after which gamma is 0.
      balance_weight: alpha, weight of the auxiliary balance loss.
      mtp_weight: lambda, weight of the MTP loss in the first part of the run.
      mtp_weight_until: fraction (0 to 1) of the run's tokens after which the weight is `mtp_weight_after`.
      mtp_weight_after: lambda in the rest of the run.
    """

    learning_rate: float = 2.2e-4
    warmup_until: float = 2000 / REPORT_STEPS
    constant_until: float = _fraction(10e12)
    cosine_until: float = _fraction(14.3e12)
    cosine_to: float = 2.2e-5 / 2.2e-4
    final_until: float = _fraction(14.3e12 + 333e9)
    last_rate: float = 7.3e-6 / 2.2e-4
    ramp_until: float = _fraction(469e9)
    ramp_from: float = 3072 / 15360
    bias_update_speed: float = 0.001
    bias_update_until: float = _fraction(14.3e12)
    balance_weight: float = 1e-4
    mtp_weight: float = 0.3
    mtp_weight_until: float = _fraction(10e12)
    mtp_weight_after: float = 0.1

    def __post_init__(self) -> None:
        phases = ("warmup_until", "constant_until", "cosine_until", "final_until")
        values = [0.0, *(getattr(self, name) for name in phases), 1.0]
        for name, (before, value) in zip(phases, itertools.pairwise(values), strict=False):
            if not before <= value <= 1.0:
                raise ConfigError(f"training.schedule.{name} must be between {before:.6g} and 1, not {value:.6g}")
        for name in ("ramp_until", "bias_update_until", "mtp_weight_until", "cosine_to", "last_rate"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"training.schedule.{name} must be between 0 and 1, not {getattr(self, name)}")
        if not 0.0 < self.ramp_from <= 1.0:
            raise ConfigError(f"training.schedule.ramp_from must be above 0 and at most 1, not {self.ramp_from}")
        for name in ("learning_rate", "bias_update_speed", "balance_weight", "mtp_weight", "mtp_weight_after"):
            if not 0.0 <= getattr(self, name) <= _LARGEST_VALUE:
                raise ConfigError(
                    f"training.schedule.{name} must be from 0 to {_LARGEST_VALUE:g}, not {getattr(self, name)}"
                )

    def rate_at(self, progress: float, of_steps: float) -> float:
        """Returns the learning rate after the fractions `progress` of the run's tokens and `of_steps` of its steps."""
        if of_steps < self.warmup_until:
            return self.learning_rate * of_steps / self.warmup_until
        if progress < self.constant_until:
            return self.learning_rate
        if progress < self.cosine_until:
            passed = (progress - self.constant_until) / (self.cosine_until - self.constant_until)
            share = self.cosine_to + (1.0 - self.cosine_to) * 0.5 * (1.0 + math.cos(math.pi * passed))
            return self.learning_rate * share
        return self.learning_rate * (self.cosine_to if progress < self.final_until else self.last_rate)

    def batch_at(self, progress: float, full_batch: int, multiple: int = 1) -> int:
        """Returns the number of sequences of a step at `progress`, rounded to a multiple of `multiple`.

        The batch grows linearly; the report does not say how it grows.
        """
        if progress >= self.ramp_until:
            return full_batch
        share = self.ramp_from + (1.0 - self.ramp_from) * progress / self.ramp_until
        return min(full_batch, max(multiple, round(share * full_batch / multiple) * multiple))

    def at(self, progress: float, of_steps: float, full_batch: int, multiple: int = 1) -> ScheduledValues:
        """Returns all values for the step that follows.

        Args:
          progress: fraction of the run's tokens already seen.
          of_steps: fraction of the run's steps already taken.
          full_batch: sequences of a step at the end of the ramp.
          multiple: a smaller batch is rounded to a multiple of this.
        """
        return ScheduledValues(
            learning_rate=self.rate_at(progress, of_steps),
            batch_size=self.batch_at(progress, full_batch, multiple),
            bias_update_speed=self.bias_update_speed if progress < self.bias_update_until else 0.0,
            balance_weight=self.balance_weight,
            mtp_weight=self.mtp_weight if progress < self.mtp_weight_until else self.mtp_weight_after,
        )


def tokens_of_run(
    schedule: TrainingSchedule, steps: int, full_batch: int, sequence_length: int, multiple: int = 1
) -> int:
    """Returns the number of tokens of a run of exactly `steps` steps, with its smaller batches at the start."""
    full = steps * full_batch * sequence_length
    if schedule.ramp_until == 0.0 or schedule.ramp_from == 1.0:
        return full

    def steps_taken(total: int) -> int:
        seen = taken = 0
        while seen < total:
            seen += schedule.batch_at(seen / total, full_batch, multiple) * sequence_length
            taken += 1
        return taken

    low, high = 1, full
    while low < high:  # a search for the fewest tokens that take all the steps
        middle = (low + high) // 2
        if steps_taken(middle) < steps:
            low = middle + 1
        else:
            high = middle
    return low
