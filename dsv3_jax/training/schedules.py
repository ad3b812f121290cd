"""The schedules of section 4.2 of the report, as data.

Everything is piecewise in the tokens seen, written as a fraction of the run, so that the same data scales down to any
run length. The defaults are the report's own 14.8T-token run.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

from dsv3_jax.errors import ConfigError

REPORT_TOKENS = 14.8e12
"""Tokens of the report's run."""


def _fraction(tokens: float) -> float:
    return tokens / REPORT_TOKENS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What the schedules say at one moment."""

    learning_rate: float
    batch_size: int
    bias_update_speed: float
    balance_weight: float
    mtp_weight: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """Phases of a run; every `*_until` is a fraction of the run's tokens.

    Attributes:
      learning_rate: the peak.
      warmup_until: end of the linear rise from 0 (2,000 steps of the smallest batch in the report).
      constant_until: end of the peak.
      cosine_until, cosine_to: end of the cosine decay, and its end as a share of the peak (2.2e-5).
      final_until: end of the constant phase after it.
      last_rate: learning rate after that, as a share of the peak (7.3e-6).
      ramp_until, ramp_from: end of the linear rise of the batch size, and its start as a share of the full batch
        (3,072 of 15,360 sequences).
      bias_update_speed, bias_update_until: gamma, and when it becomes 0.
      balance_weight: alpha, weight of the auxiliary balance loss.
      mtp_weight, mtp_weight_until, mtp_weight_after: lambda before and after its step.
    """

    learning_rate: float = 2.2e-4
    warmup_until: float = _fraction(2000 * 3072 * 4096)
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
                raise ConfigError(f"schedule.{name} must lie between {before:.6g} and 1, not {value:.6g}")
        for name in ("ramp_until", "bias_update_until", "mtp_weight_until", "cosine_to", "last_rate"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"schedule.{name} must lie between 0 and 1, not {getattr(self, name)}")
        if not 0.0 < self.ramp_from <= 1.0:
            raise ConfigError(f"schedule.ramp_from must be above 0 and at most 1, not {self.ramp_from}")
        for name in ("learning_rate", "bias_update_speed", "balance_weight", "mtp_weight", "mtp_weight_after"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"schedule.{name} must not be negative or infinite, not {getattr(self, name)}")

    def rate_at(self, progress: float) -> float:
        """Learning rate after `progress` of the run's tokens."""
        if progress < self.warmup_until:
            return self.learning_rate * progress / self.warmup_until
        if progress < self.constant_until:
            return self.learning_rate
        if progress < self.cosine_until:
            passed = (progress - self.constant_until) / (self.cosine_until - self.constant_until)
            share = self.cosine_to + (1.0 - self.cosine_to) * 0.5 * (1.0 + math.cos(math.pi * passed))
            return self.learning_rate * share
        return self.learning_rate * (self.cosine_to if progress < self.final_until else self.last_rate)

    def batch_at(self, progress: float, full_batch: int, multiple: int = 1) -> int:
        """Sequences of the batch at `progress`, rounded to a multiple of `multiple`; the report gives no ramp shape."""
        if progress >= self.ramp_until:
            return full_batch
        share = self.ramp_from + (1.0 - self.ramp_from) * progress / self.ramp_until
        return min(full_batch, max(multiple, round(share * full_batch / multiple) * multiple))

    def at(self, progress: float, full_batch: int, multiple: int = 1) -> Settings:
        """Everything at `progress`, the share of the run's tokens already seen."""
        return Settings(
            learning_rate=self.rate_at(progress),
            batch_size=self.batch_at(progress, full_batch, multiple),
            bias_update_speed=self.bias_update_speed if progress < self.bias_update_until else 0.0,
            balance_weight=self.balance_weight,
            mtp_weight=self.mtp_weight if progress < self.mtp_weight_until else self.mtp_weight_after,
        )


DEEPSEEK_V3 = Schedule()
"""The report's own schedule."""


def tokens_of_run(schedule: Schedule, steps: int, full_batch: int, sequence_length: int, multiple: int = 1) -> int:
    """Tokens of a run of exactly `steps` steps, the batch ramp included."""
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
    while low < high:  # the fewest tokens that take all the steps
        middle = (low + high) // 2
        if steps_taken(middle) < steps:
            low = middle + 1
        else:
            high = middle
    return low
