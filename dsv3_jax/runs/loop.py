"""The training loop: it wires schedules, data, step, checkpoints and metrics together, and survives interruption."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import signal
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.counts import count_flops
from dsv3_jax.data import Data, prepare_data
from dsv3_jax.errors import UserError
from dsv3_jax.model import DeepSeekV3
from dsv3_jax.precision import Precision
from dsv3_jax.sharding.mesh import MeshConfig
from dsv3_jax.pipeline.slots import moe_layers_of_stages
from dsv3_jax.runs.processes import Vigil, anywhere, in_turn, is_first, share
from dsv3_jax.runs.checkpoints import (
    Checkpoints,
    Progress,
    last_whole_checkpoint,
    restore,
)
from dsv3_jax.training.config import RunConfig
from dsv3_jax.runs.evaluation import Evaluation, evaluate
from dsv3_jax.runs.hardware import peak_flops
from dsv3_jax.runs.interruption import Interruption
from dsv3_jax.training.layout import Layout
from dsv3_jax.runs.metrics import JsonLines, Quiet, Record, TensorBoard, Terminal, Writer, read_metrics
from dsv3_jax.pipeline.passes import check_passes
from dsv3_jax.runs.plots import plot_expert_load, plot_losses
from dsv3_jax.runs.folder import RunFolder, write_atomically
from dsv3_jax.runs.sample import sample_text, whole_model
from dsv3_jax.training.schedules import ScheduledValues
from dsv3_jax.runs.starting_state import distributed_model, starting_state
from dsv3_jax.training.step import StepMetrics, StepSettings, make_evaluation_step, make_train_step

_LOAD_WINDOW = 20  # steps whose expert loads the last picture sums


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
      exit_code: 0 when it is complete, 128 + n after signal n, 3 after too many steps that were not finite.
      start, end: validation at the first and last step of this start of the run; None where interrupted.
    """

    exit_code: int
    start: Evaluation | None = None
    end: Evaluation | None = None


def train(
    config: RunConfig,
    out: Path,
    *,
    initial_model: Callable[[], DeepSeekV3] | None = None,
    timeout: float = 300.0,
) -> Outcome:
    """Trains in folder `out`, going on where an earlier start of the same run stopped.

    Several processes (`runs.processes.join`) train together when each calls this with the same arguments; the
    folder is one that all of them see.

    Args:
      initial_model: makes the model a new run starts from; fresh weights unless given.
      timeout: seconds without a step after which a process counts the others as lost, and ends.

    Raises:
      UserError: the folder holds another run, is in use or cannot be written; the data cannot be used; the mesh does
        not divide the devices, the model or the batch.
    """
    folder = RunFolder(out)
    layout = _layout(config)
    runs: list[_Run] = []
    vigil = Vigil(timeout, lambda: runs[0].standing() if runs else "nothing was changed: the same command starts again")
    with contextlib.ExitStack() as stack, vigil:
        share(lambda: stack.enter_context(folder.locked()) and None)
        interruption = stack.enter_context(Interruption())
        if folder.holds_run:
            folder.check_same_run(config)
        with folder.emptied_if_no_run_starts() if is_first() else contextlib.nullcontext():
            runs.append(_Run(config, folder, interruption, initial_model, layout, vigil))
        stack.callback(runs[0].close)
        return runs[0].train()


def _layout(config: RunConfig) -> Layout:
    """The run's layout over the devices there are, once they are known to suit."""
    sizes = config.mesh.resolve(jax.device_count())
    sizes.check(config.model, config.training.rows_per_pass)
    layers = moe_layers_of_stages(config.model, sizes.stage)
    if sizes.stage > 1:
        check_passes(config, config.training.pipeline_schedule, sizes.stage, sizes.batch_ranks)
    return Layout.of(sizes, zero=config.training.zero, overlap=config.training.overlap_exchange, layers=layers)


class _Run:
    """One start of a run, from its folder's state to its end."""

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        interruption: Interruption,
        initial: Callable[[], DeepSeekV3] | None,
        layout: Layout,
        vigil: Vigil,
    ):
        self.config, self.folder, self.interruption = config, folder, interruption
        self.layout, self.vigil = layout, vigil
        self.feeding = layout.feeding
        self.checkpoints = Checkpoints(folder, keep=config.training.keep_checkpoints)
        self.writers: list[Writer] = []
        found = share(lambda: str(last_whole_checkpoint(folder, print) or ""))
        holds_run = share(lambda: folder.holds_run)
        self.data = in_turn(lambda: self._prepare_data(holds_run))
        self.rows = self.data.train_iterator()
        if not found:
            self.skeleton, self.state = starting_state(config, layout, initial)
            self.progress = Progress(step=0, tokens=0, data=self.rows.state())
        else:
            make = functools.partial(distributed_model, config, layout)
            self.skeleton, self.state, self.progress = restore(Path(found), config, make, layout)
            self.rows.set_state(self.progress.data)
        if is_first() and not holds_run:  # last, so that a start which is refused leaves no run
            folder.write_config(config)
        self.terminal: Terminal | Quiet = Quiet()
        if is_first():
            self.terminal = Terminal(config.training.steps, self.progress.step, config.training.log_every)
            kept = self.progress.step or -1  # a run that starts over writes its first evaluation again
            self.writers = [JsonLines(folder.metrics, kept), TensorBoard(folder.tensorboard, kept), self.terminal]
        self.saved_step = self.progress.step if found else -1
        self.loads: deque[np.ndarray] = deque(maxlen=_LOAD_WINDOW)
        self.flops = count_flops(config.model, config.data.sequence_length).training_with_mtp
        self.peak = peak_flops(jax.devices()[0])

    def train(self) -> Outcome:
        """From where the run stands to its end."""
        total = self.config.total_tokens(self.layout.batch_ranks)
        self._greet(total)
        step = make_train_step(self.skeleton, self.config, self.layout)
        self.evaluation_step = make_evaluation_step(self.skeleton, self.config, self.layout)
        start = self._evaluate(first=True)
        while self.progress.step < self.config.training.steps:
            if self._stop_requested():
                return self._interrupted()
            metrics = self._step(step, self.progress.tokens / total)
            if int(metrics.nonfinite_steps) >= self.config.training.max_nonfinite_steps:
                return self._not_finite(int(metrics.nonfinite_steps))
            number, training = self.progress.step, self.config.training
            if training.checkpoint_every and number % training.checkpoint_every == 0:
                self._save()
            if training.evaluate_every and number % training.evaluate_every == 0 and number < training.steps:
                self._evaluate()
        if self._stop_requested():
            return self._interrupted()
        end = self._evaluate()
        if end is None:
            return self._interrupted()
        self._save()
        self.checkpoints.wait()
        self.vigil.end()
        self._finish(start, end)
        return Outcome(0, start, end)

    def close(self) -> None:
        """Waits for what is being written."""
        for writer in self.writers:
            writer.close()
        self.rows.close()
        self.checkpoints.close()

    def standing(self) -> str:
        """Where the run stands, for whoever must start it again."""
        if self.saved_step < 0:
            return "nothing was saved yet: the same command starts anew"
        return f"the same command goes on from step {self.saved_step}"

    def _stop_requested(self) -> bool:
        """Whether this or another process was told to stop: all leave the loop after the same step."""
        return anywhere(self.interruption.requested)

    def _prepare_data(self, holds_run: bool) -> Data:
        # Without config.json a start died before it was a run, and its tokenizer may be of other options.
        tokenizer = self.folder.tokenizer if holds_run or not is_first() else None
        data = prepare_data(
            self.config.data,
            self.folder.cache,
            tokenizer_folder=tokenizer,
            shard_index=self.feeding.index,
            shard_count=self.feeding.count,
            progress=print if is_first() else None,
        )
        size = data.tokenizer.vocab_size
        if size > self.config.model.vocab_size:
            raise UserError(
                f"the tokenizer has {size} ids, more than model.vocab_size ({self.config.model.vocab_size}): "
                f"give --model.vocab-size {size} or a smaller tokenizer"
            )
        if tokenizer is None:
            data.tokenizer.save(self.folder.tokenizer)
        return data

    def _greet(self, total: int) -> None:
        model = self.config.model
        self.terminal.say(
            f"{self.config.preset}: {model.num_parameters(mtp=True):,} parameters, "
            f"{model.num_active_parameters():,} active a token; {total:,} tokens in {self.config.training.steps} steps "
            f"on {self._where()}, {Precision.preset(self.config.precision).name} precision"
        )
        if self.progress.step:
            self.terminal.say(f"going on from step {self.progress.step}")

    def _where(self) -> str:
        kind = jax.devices()[0].device_kind
        if self.layout.mesh is None:
            return kind
        processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
        return f"{jax.device_count()} x {kind}{processes} ({MeshConfig(**self.layout.mesh.shape).written})"

    def _step(self, step: Callable, progress: float) -> StepMetrics:
        began = time.perf_counter()
        training = self.config.training
        multiple = self.config.batch_multiple(self.layout.batch_ranks)
        settings = training.schedule.at(progress, training.batch_size, multiple)
        tokens, segment_ids = self._next_batch(settings.batch_size)
        self.state, metrics = step(self.state, tokens, segment_ids, _scalars(settings))
        metrics = jax.device_get(metrics)
        self.vigil.moved()
        seen = settings.batch_size * self.config.data.sequence_length
        self.progress = Progress(self.progress.step + 1, self.progress.tokens + seen, self.rows.state())
        self._record(metrics, settings, seen / (time.perf_counter() - began))
        return metrics

    def _next_batch(self, size: int) -> tuple[jax.Array, jax.Array]:
        """Tokens and segment ids [A, B, T+1] of the next `size` sequences, of which this process reads its part."""
        passes = size // min(self.config.training.rows_per_pass, size)
        batch = self.rows.next_rows(size // self.feeding.count)
        tokens, segment_ids = (self.feeding.put(array.reshape(passes, -1, array.shape[-1])) for array in batch)
        return tokens, segment_ids

    def _record(self, metrics: StepMetrics, settings: ScheduledValues, tokens_per_second: float) -> None:
        self.loads.append(np.asarray(metrics.load))
        record: Record = {
            "step": self.progress.step,
            "tokens": self.progress.tokens,
            "loss": float(metrics.loss),
            "main_loss": float(metrics.main_loss),
            "balance_loss": float(metrics.balance_loss),
            "gradient_norm": float(metrics.gradient_norm),
            "max_violation": float(metrics.max_violation),
            "dead_experts": int(metrics.dead_experts),
            "learning_rate": settings.learning_rate,
            "batch_size": settings.batch_size,
            "tokens_per_second": tokens_per_second,
        }
        if len(metrics.mtp_loss):
            record["mtp_loss"] = float(np.mean(metrics.mtp_loss))
        if self.peak:
            record["mfu"] = tokens_per_second * self.flops / (self.peak * jax.device_count())
        self._write(record)
        if not metrics.applied:
            self.terminal.say(
                f"step {self.progress.step}: loss {record['loss']}, gradient norm {record['gradient_norm']}: "
                "not finite, so nothing was applied"
            )

    def _write(self, record: Record) -> None:
        for writer in self.writers:
            writer.write(record)

    def _evaluate(self, *, first: bool = False) -> Evaluation | None:
        params = self.state.params if self.state.average is None else self.state.average
        result = evaluate(
            self.evaluation_step,
            params,
            self.state.router_biases,
            self.data,
            self.config.training.rows_per_pass,
            layout=self.layout,
            stop=self._stop_requested,
        )
        self.vigil.moved(by_a_step=False)
        if result is None:
            return None
        if first:
            self.terminal.say(
                f"the validation text itself: {result.text_entropy:.4f} bits per byte by byte frequencies, "
                f"{result.text_gzip:.4f} by gzip"
            )
        self.terminal.say(f"step {self.progress.step}: {result.describe()}")
        record = {"step": self.progress.step, "validation_loss": result.main.loss}
        record["validation_bits_per_byte"] = result.main.bits_per_byte
        if result.mtp:
            record["validation_mtp_loss"] = result.mtp[0].loss
            record["mtp_acceptance"] = result.mtp_acceptance[0]
        if not (first and self.progress.step):
            for writer in self.writers:
                if writer is not self.terminal:
                    writer.write(record)
        return result

    def _save(self) -> None:
        if self.saved_step != self.progress.step:
            self.checkpoints.save(self.state, self.progress, self.config)
            self.saved_step = self.progress.step

    def _interrupted(self) -> Outcome:
        self._save()
        self.checkpoints.wait()
        self.terminal.say(
            f"stopped and saved at step {self.progress.step} of {self.config.training.steps}; "
            f"the same command goes on from there"
        )
        # Where another process was told to stop, this one ends as if it had been told so too.
        return Outcome(self.interruption.exit_code if self.interruption.requested else 128 + signal.SIGTERM)

    def _not_finite(self, count: int) -> Outcome:
        self.checkpoints.wait()
        kept = f"the checkpoint of step {self.saved_step} is intact" if self.saved_step > 0 else "nothing was saved"
        self.terminal.say(
            f"{count} steps in a row were not finite: stopped at step {self.progress.step}; {kept}; "
            "try a lower --training.schedule.learning-rate"
        )
        return Outcome(3)

    def _finish(self, start: Evaluation | None, end: Evaluation) -> None:
        model = whole_model(self.skeleton, self.state, self.config, self.layout)
        if not is_first():
            return
        records = read_metrics(self.folder.metrics)
        title = f"{self.config.preset}, {self.progress.tokens:,} tokens"
        plot_losses(records, self.folder.loss_plot, title)
        if self.loads and self.loads[0].shape[0]:
            load = np.sum(self.loads, axis=0)
            plot_expert_load(records, load, layer_names(self.config), self.folder.load_plot, title)
        summary = {
            "steps": self.progress.step,
            "tokens": self.progress.tokens,
            "validation": dataclasses.asdict(end),
            "validation_at_start": None if start is None else dataclasses.asdict(start),
        }
        write_atomically(self.folder.summary, json.dumps(summary, indent=1) + "\n")
        if model is not None and self.config.training.sample_tokens:
            text = sample_text(model, self.data, self.config)
            write_atomically(self.folder.sample, text)
            self.terminal.say(f"what it writes:\n{text}")
        self.terminal.say(f"results in {self.folder.path}: loss.png, expert_load.png, metrics.jsonl, checkpoints/")


def layer_names(config: RunConfig) -> list[str]:
    """Names of the layers that report expert loads, in their order."""
    model = config.model
    names = [f"layer {index}" for index in range(model.num_dense_layers, model.num_hidden_layers)]
    depth = model.num_nextn_predict_layers
    return names + [f"MTP {k}" if depth > 1 else "MTP" for k in range(1, depth + 1)]


def _scalars(settings: ScheduledValues) -> StepSettings:
    return StepSettings(
        learning_rate=jnp.float32(settings.learning_rate),
        bias_update_speed=jnp.float32(settings.bias_update_speed),
        balance_weight=jnp.float32(settings.balance_weight),
        mtp_weight=jnp.float32(settings.mtp_weight),
    )
