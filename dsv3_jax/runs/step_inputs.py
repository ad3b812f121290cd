"""The inputs of a training step: the values of the schedules, and the next rows of the training data."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Int

from dsv3_jax.data import TrainIterator
from dsv3_jax.training.config import RunConfig
from dsv3_jax.training.schedules import ScheduledValues
from dsv3_jax.training.state_layout import StateLayout
from dsv3_jax.training.step import StepSettings


class StepInputs:
    """Makes the inputs of each step of a run.

    Args:
      rows: this process's rows of the training data.

    Attributes:
      total_tokens: tokens of the whole run.
    """

    def __init__(self, config: RunConfig, layout: StateLayout, rows: TrainIterator):
        self.total_tokens = config.total_tokens(layout.batch_ranks)
        self._training = config.training
        self._multiple = config.batch_multiple(layout.batch_ranks)
        self._feeding = layout.feed
        self._rows = rows

    def scheduled_values(self, tokens: int, steps: int) -> ScheduledValues:
        """Returns the values of the schedules after `tokens` tokens in `steps` steps."""
        training = self._training
        progress, of_steps = tokens / self.total_tokens, steps / training.steps
        return training.schedule.at(progress, of_steps, training.batch_size, self._multiple)

    def next_batch(self, size: int) -> tuple[Int[Array, "A B T1"], Int[Array, "A B T1"]]:
        """Reads this process's part of the next `size` sequences.

        Returns:
          Tokens and segment ids of A passes of B sequences, int32, as arrays over all devices.
        """
        passes = size // min(self._training.rows_per_pass, size)
        batch = self._rows.next_rows(size // self._feeding.count)
        tokens, segment_ids = (self._feeding.put(array.reshape(passes, -1, array.shape[-1])) for array in batch)
        return tokens, segment_ids


def step_settings(values: ScheduledValues) -> StepSettings:
    """Returns the values as arrays, which the compiled step takes as arguments."""
    return StepSettings(
        learning_rate=jnp.float32(values.learning_rate),
        bias_update_speed=jnp.float32(values.bias_update_speed),
        balance_weight=jnp.float32(values.balance_weight),
        mtp_weight=jnp.float32(values.mtp_weight),
    )
