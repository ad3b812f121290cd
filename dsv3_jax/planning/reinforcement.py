"""The memory of reinforcement learning on every device: the policy's training step, the reference, and the engine.

`dsv3 grpo` keeps all of it at the same time. The engine reads the policy's own weights and adds a latent cache and the
logits of one decoding step. Here the engine is taken to be sharded as the policy is: every rank of the batch axes
writes its share of the sequences. (This version's engine runs on one device, so that `dsv3 grpo` on a mesh needs a
model that fits a device.)
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dsv3_jax.errors import ConfigError
from dsv3_jax.modules.paged_cache import bytes_per_token
from dsv3_jax.planning.plan import Plan
from dsv3_jax.planning.report_table import size


@dataclasses.dataclass(frozen=True)
class ReinforcementMemory:
    """The bytes on each device.

    Attributes:
      sequences: completions that are written at a time, over the whole cluster.
      policy: weights, gradients, moments and activations of the update, with what the runtime reserves.
      reference: the frozen reference's weights, in the policy's dtype and sharding; 0 without a KL term.
      cache: the engine's latent cache, for whole sequences.
      logits: float32 logits of one decoding step.
      capacity: memory of a device.
    """

    sequences: int
    policy: float
    reference: float
    cache: float
    logits: float
    capacity: float

    @classmethod
    def of(cls, plan: Plan, sequences: int, *, reference: bool) -> ReinforcementMemory:
        """Returns the memory beside the plan of the policy's update.

        Args:
          sequences: completions that are written at a time; each has up to the plan's sequence length of tokens.

        Raises:
          ConfigError: the plan keeps a running average or has pipeline stages, which `dsv3 grpo` never does.
        """
        config = plan.config
        if config.average != "none" or config.has_stages:
            raise ConfigError("--grpo needs --average none and a mesh without stages, as dsv3 grpo does")
        each = math.ceil(sequences / config.mesh.batch_ranks)
        per_token = bytes_per_token(config.model, config.recipe.dtype, mtp=False)
        return cls(
            sequences=sequences,
            policy=plan.memory,
            reference=plan.state.masters if reference else 0.0,
            cache=each * config.sequence_length * per_token,
            logits=each * config.model.vocab_size * 4.0,
            capacity=config.target.accelerator.memory,
        )

    @property
    def total(self) -> float:
        """All bytes."""
        return self.policy + self.reference + self.cache + self.logits

    def as_dict(self) -> dict[str, Any]:
        """Returns every figure for programs, with its unit in its name."""
        names = ("policy", "reference", "cache", "logits", "total")
        found = {f"{name}_bytes_a_device": getattr(self, name) for name in names}
        return found | {"sequences": self.sequences, "fits": self.total <= self.capacity}

    def table(self) -> RenderableType:
        """Returns a table of the parts and a line that says whether they fit."""
        table = Table(
            title=f"Reinforcement learning, {self.sequences:,} sequences written at a time: memory of a device",
            title_justify="left",
            title_style="bold",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
        )
        table.add_column("")
        table.add_column("bytes", justify="right")
        rows = {
            "policy: weights, moments, gradients, activations": self.policy,
            "reference": self.reference,
            "engine: latent cache": self.cache,
            "engine: logits of a step": self.logits,
            "all": self.total,
        }
        for name, value in rows.items():
            table.add_row(name, size(value))
        spare = self.capacity - self.total
        verdict = f"Fits: {size(spare)} to spare." if spare >= 0 else f"Does not fit: {size(-spare)} too much."
        return Group(table, Text(verdict, style="green" if spare >= 0 else "red"))
