"""Hyper-parameters that change during training, as data (report section 4.2).

Each is a piecewise function of the number of tokens trained on, so that a recipe shrinks to any run length.
`DEEPSEEK_V3` is the report's own; `DEEPSEEK_V3.scaled(...)` is its shape at another size.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dsv3_jax.errors import ConfigError

Shape = Literal["constant", "linear", "cosine"]


@dataclasses.dataclass(frozen=True)
class Phase:
    """One stretch of a schedule, from where the phase before it ended.

    Attributes:
      until: tokens at which the phase ends; that token count itself belongs to the next phase.
      start, end: values at its two ends ("constant" stays at `start`).
      shape: how it goes from one to the other.
    """

    until: float
    start: float
    end: float
    shape: Shape = "constant"

    def __post_init__(self) -> None:
        if self.shape not in get_args(Shape):
            raise ConfigError(f"a phase's shape must be one of {', '.join(get_args(Shape))}, not {self.shape!r}")
        if not all(map(math.isfinite, (self.until, self.start, self.end))):
            raise ConfigError(f"a phase's numbers must be finite, not {self}")
        if self.shape == "constant" and self.start != self.end:
            raise ConfigError(f"a constant phase cannot go from {self.start} to {self.end}")

    @classmethod
    def hold(cls, value: float, until: float) -> Phase:
        """A constant phase."""
        return cls(until, value, value)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A piecewise function of tokens; after its last phase it keeps that phase's end value."""

    phases: tuple[Phase, ...]

    def __post_init__(self) -> None:
        ends = [0.0, *(phase.until for phase in self.phases)]
        if not self.phases or any(b <= a for a, b in zip(ends[:-1], ends[1:], strict=True)):
            raise ConfigError(f"the phases of a schedule must end one after the other, not at {ends[1:]} tokens")

    def __call__(self, tokens: Any) -> Any:
        """The value at `tokens`: a Python float for a number, an array for an array (also inside jit)."""
        if isinstance(tokens, jax.Array):
            return self._evaluate(tokens, jnp)
        values = self._evaluate(np.asarray(tokens, np.float64), np)
        return float(values) if np.ndim(values) == 0 else values

    def _evaluate(self, tokens: Float[Array, "*n"], xp: Any) -> Float[Array, "*n"]:
        value = xp.full_like(tokens, self.phases[-1].end)
        begins = [0.0, *(phase.until for phase in self.phases[:-1])]
        for begin, phase in reversed(list(zip(begins, self.phases, strict=True))):
            fraction = (tokens - begin) / (phase.until - begin)
            value = xp.where(tokens < phase.until, _interpolate(phase, fraction, xp), value)
        return value

    def scaled(self, *, time: float = 1.0, value: float = 1.0) -> Schedule:
        """The same shape with every token count times `time` and every value times `value`."""
        return Schedule(
            tuple(Phase(p.until * time, p.start * value, p.end * value, p.shape) for p in self.phases),
        )


def _interpolate(phase: Phase, fraction: Any, xp: Any) -> Any:
    if phase.shape == "constant":
        return phase.start
    if phase.shape == "linear":
        return phase.start + (phase.end - phase.start) * fraction
    return phase.end + (phase.start - phase.end) * 0.5 * (1.0 + xp.cos(math.pi * fraction))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedules:
    """Everything that changes during a run, as functions of tokens.

    Attributes:
      total_tokens: length of the run.
      learning_rate: of AdamW.
      batch_size: sequences a step.
      bias_update_speed: gamma of auxiliary-loss-free balancing (section 2.1.2).
      balance_loss_weight: alpha of the balance loss, Eq. 17.
      mtp_loss_weight: lambda of multi-token prediction, Eq. 25.
    """

    total_tokens: float
    learning_rate: Schedule
    batch_size: Schedule
    bias_update_speed: Schedule
    balance_loss_weight: Schedule
    mtp_loss_weight: Schedule

    def scaled(
        self,
        total_tokens: float,
        *,
        peak_learning_rate: float | None = None,
        warmup_tokens: float | None = None,
        batch_size: float | None = None,
        bias_update_speed: float | None = None,
        balance_loss_weight: float | None = None,
    ) -> Schedules:
        """The same phases over a run of `total_tokens`.

        Args:
          total_tokens: every phase keeps its share of the run.
          peak_learning_rate: replaces the peak; the later phases keep their ratio to it.
          warmup_tokens: length of the linear warm-up, whose share of a 14.8T-token run (0.17%) is less than a step
            of a short one.
          batch_size: replaces the final batch size; the ramp keeps its ratio to it.
          bias_update_speed, balance_loss_weight: replace the values of the first phase likewise.
        """
        time = total_tokens / self.total_tokens
        learning_rate = self.learning_rate.scaled(
            time=time, value=_ratio(peak_learning_rate, max(p.start for p in self.learning_rate.phases))
        )
        if warmup_tokens is not None:
            learning_rate = _with_warmup(learning_rate, warmup_tokens)
        return Schedules(
            total_tokens=total_tokens,
            learning_rate=learning_rate,
            batch_size=self.batch_size.scaled(time=time, value=_ratio(batch_size, self.batch_size.phases[-1].end)),
            bias_update_speed=self.bias_update_speed.scaled(
                time=time, value=_ratio(bias_update_speed, self.bias_update_speed.phases[0].start)
            ),
            balance_loss_weight=self.balance_loss_weight.scaled(
                time=time, value=_ratio(balance_loss_weight, self.balance_loss_weight.phases[0].start)
            ),
            mtp_loss_weight=self.mtp_loss_weight.scaled(time=time),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Schedules:
        """The inverse of `to_dict`."""
        made = {
            name: value if name == "total_tokens" else Schedule(tuple(Phase(**phase) for phase in value["phases"]))
            for name, value in values.items()
        }
        return cls(**made)


def _ratio(wanted: float | None, have: float) -> float:
    return 1.0 if wanted is None else wanted / have


def _with_warmup(schedule: Schedule, tokens: float) -> Schedule:
    """`schedule` with its first, linear phase ending at `tokens` (0: no warm-up)."""
    warmup, *rest = schedule.phases
    if tokens >= rest[0].until:
        raise ConfigError(
            f"a warm-up of {tokens:.0f} tokens does not fit before the learning rate's {rest[0].until:.0f}; "
            "shorten the warm-up or lengthen the run"
        )
    first = (dataclasses.replace(warmup, until=tokens),) if tokens > 0 else ()
    return Schedule((*first, *rest))


_T = 1e12
_TOTAL = 14.8 * _T
# 2K steps. The batch grows by a few percent meanwhile (the shape of its ramp is not published); counted at 3072.
_WARMUP = 2000 * 3072 * 4096.0

DEEPSEEK_V3 = Schedules(
    total_tokens=_TOTAL,
    learning_rate=Schedule(
        (
            Phase(_WARMUP, 0.0, 2.2e-4, "linear"),
            Phase.hold(2.2e-4, 10 * _T),
            Phase(14.3 * _T, 2.2e-4, 2.2e-5, "cosine"),
            Phase.hold(2.2e-5, 14.633 * _T),
            Phase.hold(7.3e-6, _TOTAL),
        )
    ),
    batch_size=Schedule((Phase(0.469 * _T, 3072.0, 15360.0, "linear"), Phase.hold(15360.0, _TOTAL))),
    bias_update_speed=Schedule((Phase.hold(0.001, 14.3 * _T), Phase.hold(0.0, _TOTAL))),
    balance_loss_weight=Schedule((Phase.hold(1e-4, _TOTAL),)),
    mtp_loss_weight=Schedule((Phase.hold(0.3, 10 * _T), Phase.hold(0.1, _TOTAL))),
)
"""The report's pre-training of the 671B model: 14.8T tokens."""
