"""The training loop: takes the remaining steps of a run, evaluates, saves checkpoints, and stops when told to."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax

from dsv3_jax.model import DeepSeekV3
from dsv3_jax.modules.devices import Devices
from dsv3_jax.runs.agreement import any_process, is_first, share
from dsv3_jax.runs.checkpoints import Checkpoints
from dsv3_jax.runs.evaluation import Evaluation, PairEvaluation, evaluate
from dsv3_jax.runs.folder import RunFolder, write_atomically
from dsv3_jax.runs.interruption import Interrupted, Interruption
from dsv3_jax.runs.metrics import json_value
from dsv3_jax.runs.peer_watchdog import PeerWatchdog
from dsv3_jax.runs.peers import Peers
from dsv3_jax.runs.reporter import Reporter
from dsv3_jax.runs.results import write_results
from dsv3_jax.runs.sample import sample_text, whole_model
from dsv3_jax.runs.start import Continuation, RunStart, run_layout, start_or_resume, with_known_precision
from dsv3_jax.runs.step_inputs import StepInputs, step_settings
from dsv3_jax.runs.teacher import load_teacher
from dsv3_jax.terminal import say
from dsv3_jax.training.config import RunConfig
from dsv3_jax.training.evaluation_step import make_evaluation_step
from dsv3_jax.training.state_layout import StateLayout
from dsv3_jax.training.step import StepMetrics, make_train_step

NOT_FINITE = 3
"""Exit code of a run that was stopped because too many steps in a row were infinite or NaN."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
      exit_code: 0 when the run is complete, 128 + n after signal n, 3 after too many steps that were not finite.
      start: result on the validation set before the first step of this call; None where the run was interrupted, and of
        a reward model, whose results are in summary.json.
      end: result after the last step; None in the same cases.
    """

    exit_code: int
    start: Evaluation | None = None
    end: Evaluation | None = None


def train(
    config: RunConfig,
    out: Path | str | None = None,
    *,
    initial_model: Callable[[Devices], DeepSeekV3] | None = None,
    continuation: Continuation | None = None,
    epochs: float | None = None,
    peers: Peers | None = None,
) -> Outcome:
    """Trains a model, as `dsv3 train` and `dsv3 sft` do, and writes everything about the run into the folder `out`.

    If the folder already holds the same run, training resumes from its newest checkpoint. Several processes
    (`runs.processes.join`) train together when each calls this function with the same arguments and `out` is on a file
    system they share.

        config = dsv3.default_run("nano")
        config = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=100))
        dsv3.train(config)

    Args:
      config: the run. `dsv3.default_run(preset)` gives the default of a preset.
      out: folder of the run; `runs/<preset>` in the current folder if not given.
      initial_model: returns the model that a new run starts from, given the devices that keep its parameters; random
        weights if not given.
      continuation: the checkpoint of another run that a new run goes on from: with its optimizer, at its step, and at
        its place in the data if these are the same.
      epochs: passes over the data, which set the number of steps of a new run; that of `config` if not given.
      peers: the other processes, which `runs.processes.join` returns; a process that loses them exits.

    Returns:
      The exit code, and the results on the validation set.

    Raises:
      UserError: the folder holds another run, is in use or cannot be written; the data cannot be used; or the mesh does
        not fit the devices, the model or the batch.
    """
    folder = RunFolder(Path("runs") / config.preset if out is None else Path(out))
    layout = run_layout(config)
    runs: list[_Run] = []

    def how_to_resume() -> str:
        return runs[0].how_to_resume() if runs else "run the same command to start again"

    def last_words() -> str:
        if peers is not None:
            peers.end_all(interruption.exit_code, "it was told to stop")
        return f"dsv3: stopped; {how_to_resume()}"

    interruption = Interruption(last_words, config.training.stop_signal)
    if peers is not None:
        peers.last_words = how_to_resume
    try:
        with contextlib.ExitStack() as stack, PeerWatchdog(peers) as watchdog, interruption:
            share(lambda: stack.enter_context(folder.locked()) and None)
            config, why_precision = with_known_precision(config, folder, continuation)
            if folder.holds_run:
                folder.check_same_run(config)
                epochs = None
            with folder.removed_if_no_run_starts() if is_first() else contextlib.nullcontext():
                start = start_or_resume(config, folder, layout, initial_model, continuation, epochs)
                if why_precision and is_first():
                    say(why_precision)
                runs.append(_Run(folder, layout, start, interruption, watchdog))
            stack.callback(runs[0].close)
            interruption.defer = True
            return runs[0].train()
    except Interrupted as stop:
        say(last_words(), to=sys.stderr)
        return Outcome(stop.exit_code)


class _Run:
    """One call of `train`: the state of the run and the loop over its steps."""

    def __init__(
        self,
        folder: RunFolder,
        layout: StateLayout,
        start: RunStart,
        interruption: Interruption,
        watchdog: PeerWatchdog,
    ):
        config = start.config
        self.config, self.folder, self.layout = config, folder, layout
        self.interruption, self.watchdog = interruption, watchdog
        self.data, self.rows = start.data, start.rows
        self.skeleton, self.state, self.position = start.skeleton, start.state, start.position
        self.saved_step = start.saved_step
        self.inputs = StepInputs(config, layout, start.rows)
        self.checkpoints = Checkpoints(folder, start.data.tokenizer, keep=config.training.keep_checkpoints)
        self.reporter = Reporter(folder, config, start.position.step)

    def train(self) -> Outcome:
        """Runs the remaining steps, then writes the results of the run."""
        training = self.config.training
        self.reporter.introduce(self.inputs.total_tokens, self.layout)
        teacher = load_teacher(self.config, self.layout, self.data.tokenizer)
        given = () if teacher is None else (teacher,)
        take_step = make_train_step(self.skeleton, self.config, self.layout, *given)
        self.evaluation_step = make_evaluation_step(self.skeleton, self.config, self.layout)
        if self.position.step > 0 > self.saved_step:  # what a run goes on from is in its own folder from now on
            self._save()
        start, first_step = self._evaluate(first=True), self.position.step
        while self.position.step < training.steps:
            if self._stop_requested():
                return self._interrupted()
            metrics = self._step(take_step)
            if int(metrics.nonfinite_steps) >= training.max_nonfinite_steps:
                return self._not_finite(int(metrics.nonfinite_steps))
            step = self.position.step
            if training.checkpoint_every and step % training.checkpoint_every == 0:
                self._save()
            if training.evaluates_after(step) and step < training.steps:
                self._evaluate()
        if self._stop_requested():
            return self._interrupted()
        end = self._evaluate() if self.position.step > first_step or start is None else start
        if end is None:
            return self._interrupted()
        self._save()
        self.checkpoints.wait()
        self.interruption.unsaved = False
        self.watchdog.end()
        self._write_results(end)
        return Outcome(0, *(result if isinstance(result, Evaluation) else None for result in (start, end)))

    def close(self) -> None:
        """Waits for files that are still being written, and closes them, whichever of them fails."""
        with contextlib.ExitStack() as stack:
            for part in (self.checkpoints, self.rows, self.reporter):
                stack.callback(part.close)

    def how_to_resume(self) -> str:
        """Says which step the run can be resumed from, for the message of a process that has to end."""
        if self.saved_step < 0:
            return "nothing was saved yet: run the same command to start again"
        return f"run the same command to resume from step {self.saved_step}"

    def _step(self, take_step: Callable) -> StepMetrics:
        began = time.perf_counter()
        values = self.inputs.scheduled_values(self.position.tokens, self.position.step)
        batch = self.inputs.next_batch(values.batch_size)
        self.state, metrics = take_step(self.state, *batch, step_settings(values))
        metrics = jax.device_get(metrics)
        self.interruption.unsaved = True
        self.watchdog.progressed()
        tokens = values.batch_size * self.config.data.sequence_length
        self.position = dataclasses.replace(
            self.position, step=self.position.step + 1, tokens=self.position.tokens + tokens, data=self.rows.state()
        )
        self.reporter.report_step(self.position, metrics, values, tokens / (time.perf_counter() - began))
        return metrics

    def _evaluate(self, *, first: bool = False) -> Evaluation | PairEvaluation | None:
        """Evaluates on the validation set and reports the result; None where the run was told to stop meanwhile."""
        params = self.state.weights(self.config.lora)
        result = evaluate(
            self.evaluation_step,
            params,
            self.state.router_biases,
            self.data,
            self.config.training.rows_per_pass,
            layout=self.layout,
            stop=self._stop_requested,
        )
        self.watchdog.progressed(by_a_step=False)
        if result is not None:
            if self.position.step == 0:
                result_at_start = json_value(dataclasses.asdict(result))
                self.position = dataclasses.replace(self.position, validation_at_start=result_at_start)
            self.reporter.report_evaluation(self.position.step, result, first=first)
        return result

    def _save(self) -> None:
        if self.saved_step != self.position.step:
            self.reporter.flush()
            self.checkpoints.save(self.state, self.position, self.config)
            self.saved_step = self.position.step

    def _write_results(self, end: Evaluation | PairEvaluation) -> None:
        model = whole_model(self.skeleton, self.state, self.config, self.layout)  # by all processes together
        if not is_first():
            return
        write_results(self.folder, self.config, self.position, self.reporter.recent_load, end)
        if model is not None and self.config.training.sample_tokens:
            text = sample_text(model, self.data, self.config)
            write_atomically(self.folder.sample, text)
            self.reporter.say(f"sample (validation text up to the |, then the model's continuation):\n{text}")
        written = (self.folder.loss_plot, self.folder.load_plot, self.folder.metrics, self.folder.checkpoints)
        names = ", ".join(path.name for path in written if path.exists())
        self.reporter.say(f"results in {self.folder.path}: {names}")

    def _stop_requested(self) -> bool:
        """Returns whether any process was told to stop. All of them leave the loop after the same step."""
        return any_process(self.interruption.requested)

    def _interrupted(self) -> Outcome:
        self._save()
        self.checkpoints.wait()
        self.reporter.say(
            f"stopped and saved at step {self.position.step} of {self.config.training.steps}; "
            "run the same command to resume"
        )
        # If another process was told to stop, this one exits with the code of SIGTERM.
        return Outcome(self.interruption.exit_code if self.interruption.requested else 128 + signal.SIGTERM)

    def _not_finite(self, count: int) -> Outcome:
        self.checkpoints.wait()
        kept = f"the checkpoint of step {self.saved_step} is intact" if self.saved_step > 0 else "nothing was saved"
        self.reporter.say(
            f"stopped at step {self.position.step}: {count} steps in a row had a loss or gradient that was not finite; "
            f"{kept}; try a lower --training.schedule.learning-rate"
        )
        return Outcome(NOT_FINITE)
