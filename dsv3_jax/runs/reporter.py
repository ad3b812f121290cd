"""What a run reports while it trains: numbers for its files, lines for the terminal."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Int

from dsv3_jax.counts import count_flops
from dsv3_jax.precision import Precision
from dsv3_jax.runs.agreement import is_first
from dsv3_jax.runs.evaluation import Evaluation, PairEvaluation
from dsv3_jax.runs.folder import RunFolder
from dsv3_jax.runs.hardware import peak_flops
from dsv3_jax.runs.metrics import JsonLines, Record, Terminal, describe
from dsv3_jax.runs.saved_run import RunPosition
from dsv3_jax.runs.trackers import Tracker, open_tracker
from dsv3_jax.sharding.mesh import MeshConfig
from dsv3_jax.training.config import RunConfig
from dsv3_jax.training.schedules import ScheduledValues
from dsv3_jax.training.state_layout import StateLayout
from dsv3_jax.training.step import StepMetrics

_RECENT_STEPS = 20  # steps whose expert loads are summed for the picture at the end


class Records:
    """Writes metrics.jsonl, tells the tracker, and prints lines. Only the first process of a run does so.

    Args:
      step: the step the run starts or resumes from; records of later steps, from an earlier start, are dropped.
      describe: returns the numbers of a step as a line of at most so many characters.
    """

    def __init__(self, folder: RunFolder, config: RunConfig, step: int, describe: Callable[[Record, int], str]):
        self._config, self._step = config, step
        self._terminal: Terminal | None = None
        self._lines: JsonLines | None = None
        self._tracker: Tracker | None = None
        if is_first():
            self._terminal = Terminal(config.training.steps, step, config.training.log_every, describe)
            last_kept = step or -1  # a run that starts over writes the evaluation of step 0 again
            self._lines = JsonLines(folder.metrics, last_kept, self.say)
            self._tracker = open_tracker(config.training.tracker, folder, config, last_kept)

    def write_step(self, record: Record) -> None:
        """Records the numbers of a step and shows them."""
        self.write(record)
        if self._terminal is not None:
            self._terminal.write(record)

    def write(self, record: Record) -> None:
        """Records the numbers of a step or of the evaluation after it, unless they are recorded already."""
        if self._lines is None or self._tracker is None or self._lines.holds(record):
            return
        self._lines.write(record)
        self._tracker.write(record)

    def say(self, text: str) -> None:
        """Prints a line, on the first process only."""
        if self._terminal is not None:
            self._terminal.say(text)

    def flush(self) -> None:
        """Waits until all records are on the disk."""
        for file in (self._lines, self._tracker):
            if file is not None:
                file.flush()

    def close(self) -> None:
        """Closes the files and the progress bar."""
        for writer in (self._lines, self._tracker, self._terminal):
            if writer is not None:
                writer.close()


class Reporter(Records):
    """Reports the steps and evaluations of a training run; arguments as of `Records`."""

    def __init__(self, folder: RunFolder, config: RunConfig, step: int):
        super().__init__(folder, config, step, describe)
        self._recent_loads: deque[np.ndarray] = deque(maxlen=_RECENT_STEPS)
        self._flops = count_flops(config.model, config.data.sequence_length).training_with_mtp
        self._peak = peak_flops(jax.devices()[0])

    @property
    def recent_load(self) -> Int[np.ndarray, "layers E"] | None:
        """Tokens sent to each expert over the last steps; None where there was no step or the model has no experts."""
        if not self._recent_loads or not len(self._recent_loads[0]):
            return None
        return np.sum(self._recent_loads, axis=0)

    def introduce(self, total_tokens: int, layout: StateLayout) -> None:
        """Says what will be trained, on which devices, and how to read the lines that follow."""
        model, config = self._config.model, self._config
        self.say(
            f"{config.preset}: {model.num_parameters(mtp=True):,} parameters, "
            f"{model.num_active_parameters():,} active per token; {total_tokens:,} tokens in {config.training.steps} "
            f"steps on {_devices(layout)}, {Precision.preset(config.precision).name} precision"
        )
        self.say("MaxVio below is (tokens of the busiest expert / average) - 1, mean over layers; 0 means balanced")
        if self._step:
            self.say(f"resuming from step {self._step}")

    def report_step(
        self, position: RunPosition, metrics: StepMetrics, values: ScheduledValues, tokens_per_second: float
    ) -> None:
        """Records one step, and says so when its update was skipped."""
        self._recent_loads.append(np.asarray(metrics.load))
        record: Record = {
            "step": position.step,
            "tokens": position.tokens,
            "loss": float(metrics.loss),
            "main_loss": float(metrics.main_loss),
            "balance_loss": float(metrics.balance_loss),
            "gradient_norm": float(metrics.gradient_norm),
            "max_violation": float(metrics.max_violation),
            "dead_experts": int(metrics.dead_experts),
            "learning_rate": values.learning_rate,
            "batch_size": values.batch_size,
            "tokens_per_second": tokens_per_second,
        }
        if metrics.distillation_loss is not None:
            record["distillation_loss"] = float(metrics.distillation_loss)
        if metrics.largest_logit is not None:
            record["largest_logit"] = float(metrics.largest_logit)
        if len(metrics.mtp_loss):
            record["mtp_loss"] = float(np.mean(metrics.mtp_loss))
        if self._peak:
            record["mfu"] = tokens_per_second * self._flops / (self._peak * jax.device_count())
        self.write_step(record)
        if not metrics.applied:
            self.say(
                f"step {position.step}: loss {record['loss']}, gradient norm {record['gradient_norm']}: "
                "not finite, so this update was skipped"
            )

    def report_evaluation(self, step: int, result: Evaluation | PairEvaluation, *, first: bool) -> None:
        """Says a result on the validation set, and records it where the run evaluates after this step.

        Args:
          first: it is the first one of this start. A resumed run evaluates once more, wherever it goes on from.
        """
        if first:
            self.say(result.describe_baselines())
        self.say(f"step {step}: {result.describe()}")
        if not self._config.training.evaluates_after(step):
            return
        self.write({"step": step, **result.numbers()})


def _devices(layout: StateLayout) -> str:
    kind = jax.devices()[0].device_kind
    if layout.mesh is None:
        return kind
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{jax.device_count()} x {kind}{processes} ({MeshConfig(**layout.mesh.shape).written})"
