"""The life of a run of reinforcement learning: rollouts, updates, checkpoints, and stopping when told to."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsv3_jax.data import Tokenizer
from dsv3_jax.errors import UserError
from dsv3_jax.inference import Engine, EngineConfig
from dsv3_jax.post_training.config import ReinforcementConfig
from dsv3_jax.post_training.policy_step import PolicyMetrics
from dsv3_jax.post_training.rollouts import HeldOut, Rollout, answer_held_out, draw_rollout, joined_rollouts
from dsv3_jax.post_training.tasks import ProblemSource
from dsv3_jax.runs.agreement import gather, is_first, share
from dsv3_jax.runs.checkpoints import Checkpoints
from dsv3_jax.runs.folder import RunFolder, write_atomically
from dsv3_jax.runs.interruption import Interrupted, Interruption
from dsv3_jax.runs.loop import NOT_FINITE
from dsv3_jax.runs.metrics import Record, joined, read_metrics
from dsv3_jax.runs.model_rewards import with_loaded_models
from dsv3_jax.runs.peer_watchdog import PeerWatchdog
from dsv3_jax.runs.peers import Peers
from dsv3_jax.runs.plots import plot_rewards
from dsv3_jax.runs.policy_updates import PolicyUpdates
from dsv3_jax.runs.reinforcement_start import ReinforcementStart, start_or_resume
from dsv3_jax.runs.reporter import Records
from dsv3_jax.runs.samples import sample_page
from dsv3_jax.runs.saved_rollout import read_rollout, rollout_from_bytes, rollout_to_bytes, write_rollout
from dsv3_jax.runs.start import run_layout
from dsv3_jax.terminal import say
from dsv3_jax.training.config import RunConfig
from dsv3_jax.training.state_layout import StateLayout

_MOST_SEQUENCES = 64  # that the engine writes at a time


def reinforce(
    config: RunConfig, settings: ReinforcementConfig, source: Path, out: Path, *, peers: Peers | None = None
) -> int:
    """Trains a policy by reward, as the command `dsv3 grpo` does, and returns the exit code.

    If the folder `out` already holds the same run, it goes on from its newest checkpoint. On a CPU in float32 a run
    that was interrupted computes the same bits as one that was not.

    Several processes (`runs.processes.join`) train together when each calls this function with the same arguments and
    `out` is on a file system they share. Each process has an engine on its first device, and draws the completions of
    its share of a step's problems; they are then gathered, and updates are computed by all devices together.

    Args:
      config: the run: model, optimizer, steps and what is saved. `training.batch_size` is the number of completions of
        an update, and a step is a rollout with its updates.
      settings: rollouts and objective.
      source: run or published checkpoint that the policy starts from.
      out: folder of the run.
      peers: the other processes, which `runs.processes.join` returns; a process that loses them exits.

    Raises:
      UserError: the folder holds another run or cannot be written, source or task cannot be used, or the processes
        cannot share the problems evenly.
    """
    if settings.rollout.prompts % jax.process_count():
        raise UserError(
            f"prompts ({settings.rollout.prompts}) must be a multiple of the number of processes "
            f"({jax.process_count()}), which draw the completions of equally many problems"
        )
    folder = RunFolder(out)
    layout = run_layout(config)
    runs: list[_Run] = []

    def how_to_resume() -> str:
        return runs[0].how_to_resume() if runs else "run the same command to start again"

    def last_words() -> str:
        if peers is not None:
            peers.end_all(interruption.exit_code, "it was told to stop")
        return f"dsv3: stopped; {how_to_resume()}"

    interruption = Interruption(last_words)
    if peers is not None:
        peers.last_words = how_to_resume
    try:
        with contextlib.ExitStack() as stack, PeerWatchdog(peers) as watchdog, interruption:
            share(lambda: stack.enter_context(folder.locked()) and None)
            with folder.removed_if_no_run_starts() if is_first() else contextlib.nullcontext():
                problems = ProblemSource(settings.rollout.task, settings.rollout.seed, settings.rollout.size)
                _check_lengths(config, settings, problems)
                start = start_or_resume(config, settings, folder, layout, source)
                runs.append(_Run(config, settings, folder, layout, problems, start, interruption, watchdog))
            stack.callback(runs[0].close)
            interruption.defer = True
            return runs[0].train()
    except Interrupted as stop:
        say(last_words(), to=sys.stderr)
        return stop.exit_code


class _Run:
    """One call of `reinforce`: the policy, the engine that draws from it, and the loop over the steps."""

    def __init__(
        self,
        config: RunConfig,
        settings: ReinforcementConfig,
        folder: RunFolder,
        layout: StateLayout,
        problems: ProblemSource,
        start: ReinforcementStart,
        interruption: Interruption,
        watchdog: PeerWatchdog,
    ):
        self.config, self.settings, self.folder = config, settings, folder
        self.interruption, self.watchdog = interruption, watchdog
        self.tokenizer: Tokenizer = start.tokenizer
        self.state, self.position, self.saved_step = start.state, start.position, start.saved_step
        self.updates = PolicyUpdates(start.skeleton, config, settings, layout)
        self.held_out = problems.held_out(settings.held_out)
        self.checkpoints = Checkpoints(folder, self.tokenizer, keep=config.training.keep_checkpoints)
        self.records = Records(folder, config, self.position.step, _describe)
        self.engine = self._make_engine()
        judge = settings.rollout.judge
        self.rule = with_loaded_models(settings.rollout.rule(), judge, self.engine, self.tokenizer)
        self.drawing = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="rollout")
        self.pending = read_rollout(start.saved_path) if start.saved_path is not None else None
        drawn = settings.rollout.prompts if self.pending is not None else 0
        self.problems = problems.training(self.position.data["problems"] + drawn)

    def train(self) -> int:
        """Runs the remaining steps, then writes the results of the run; returns the exit code."""
        training = self.config.training
        self._introduce()
        if training.evaluates_after(self.position.step) and self._evaluate() is None:
            return self._interrupted()
        while self.position.step < training.steps:
            if not self._step():
                return self._interrupted()
            step = self.position.step
            if self.state_nonfinite >= training.max_nonfinite_steps:
                return self._not_finite()
            if training.evaluates_after(step) and self._evaluate() is None:
                return self._interrupted()
            if training.checkpoint_every and step % training.checkpoint_every == 0:
                self._save()
        self._save()
        self.checkpoints.wait()
        self.interruption.unsaved = False
        self.watchdog.end()
        if is_first():
            self._write_results()
        return 0

    def close(self) -> None:
        """Waits for files that are still being written, and closes them, whichever of them fails."""
        with contextlib.ExitStack() as stack:
            for part in (self.checkpoints, self.records):
                stack.callback(part.close)
            stack.callback(self.drawing.shutdown)

    def how_to_resume(self) -> str:
        """Says which step the run can be resumed from."""
        return (
            f"run the same command to {f'resume from step {self.saved_step}' if self.saved_step > 0 else 'start again'}"
        )

    @property
    def state_nonfinite(self) -> int:
        """How many of the latest updates in a row were not finite."""
        return int(self.state.nonfinite_steps)

    def _make_engine(self) -> Engine:
        rollout, context = self.settings.rollout, self.config.model.max_position_embeddings
        rows = min(rollout.prompts // jax.process_count() * rollout.group, _MOST_SEQUENCES)
        engine_config = EngineConfig(
            max_sequences=rows,
            context=context,
            chunk_rows=min(8, rows),
            drafts=0,
            top_logprobs=1,
            tiled_weights=False,  # a copy, which every update would make anew
            record_experts=self.settings.replay_experts and self.config.model.num_moe_layers > 0,
        )
        return Engine(self.updates.model(self.state), engine_config)

    def _introduce(self) -> None:
        config, rollout, objective = self.config, self.settings.rollout, self.settings.objective
        reference = f"KL weight {objective.kl_weight:g} to a frozen copy" if objective.kl_weight else "no reference"
        self.records.say(
            f"{config.preset}: {config.model.num_parameters(mtp=True):,} parameters; {config.training.steps} steps of "
            f"{rollout.prompts} problems ({rollout.task}) with {rollout.group} completions each, "
            f"{self.settings.updates} updates a step, {objective.ratio} ratios, {reference}"
        )
        self.records.say("router biases and MTP modules stay as they are")
        if self.position.step:
            self.records.say(f"resuming from step {self.position.step}")

    def _draw(self, step: int) -> Rollout | None:
        """Draws the completions of this process's problems of a step; None where it was told to stop."""
        count = self.settings.rollout.prompts // jax.process_count()
        first = count * jax.process_index()
        problems = [next(self.problems) for _ in range(self.settings.rollout.prompts)][first : first + count]
        rollout, stop = self.settings.rollout, self._stop_requested
        return draw_rollout(self.engine, self.tokenizer, problems, rollout, step=step, rule=self.rule, stop=stop)

    def _of_all(self, drawn: Rollout | None) -> Rollout | None:
        """Returns what all processes have drawn for a step; None where any of them was told to stop."""
        if jax.process_count() == 1:
            return drawn
        parts = gather(b"" if drawn is None else rollout_to_bytes(drawn))
        self.watchdog.progressed(by_a_step=False)
        return joined_rollouts([rollout_from_bytes(part) for part in parts]) if all(parts) else None

    def _step(self) -> bool:
        """Takes one step; returns False where the run was told to stop, with the state before the step."""
        began = time.perf_counter()
        step = self.position.step
        rollout = self.pending if self.pending is not None else self._of_all(self._draw(step))
        if rollout is None:
            return False
        ahead = None
        if self.settings.one_step_behind and step + 1 < self.config.training.steps:
            ahead = self.drawing.submit(self._draw, step + 1)
        waited = time.perf_counter()
        learning_rate = self.config.training.schedule.rate_at(step / self.config.training.steps, self._of_steps)
        compare = self.config.training.evaluates_after(step + 1)
        state, metrics, numbers = self.updates.take(self.state, rollout, step, learning_rate, compare_routing=compare)
        updated = time.perf_counter()
        following = self._of_all(ahead.result()) if ahead is not None else None
        if ahead is not None and following is None:
            return False
        self.state, self.pending = state, following
        self.interruption.unsaved = True
        self.watchdog.progressed()
        count = self.settings.rollout.prompts
        self.position = dataclasses.replace(
            self.position,
            step=step + 1,
            tokens=self.position.tokens + sum(len(row.ids) for row in rollout.completions),
            data={"problems": self.position.data["problems"] + count},
        )
        self.engine.update(self.updates.model(self.state))
        times = {"update": updated - waited, "whole": time.perf_counter() - began}
        self._report(rollout, metrics, numbers | {"learning_rate": learning_rate}, times)
        return True

    @property
    def _of_steps(self) -> float:
        # The first step has a learning rate above 0.
        return (self.position.step + 1) / self.config.training.steps

    def _report(
        self, rollout: Rollout, metrics: list[PolicyMetrics], numbers: dict[str, float], times: dict[str, float]
    ) -> None:
        rows, rewards = rollout.completions, rollout.rewards()
        tokens = sum(len(row.ids) for row in rows)
        scores = {f"reward_{name}": value for name, value in rollout.scores().items() if name != "reward"}
        record: Record = {
            "step": self.position.step,
            "tokens": self.position.tokens,
            "reward": float(np.mean(rewards)),
            **scores,
            "length": tokens / len(rows),
            "cut_share": float(np.mean([row.cut for row in rows])),
            "equal_groups": rollout.equal_groups(),
            "loss": float(np.mean([each.terms.loss for each in metrics])),
            "entropy": float(np.mean([each.entropy for each in metrics])),
            "clip_share": float(np.mean([each.terms.clipped for each in metrics])),
            # The first update is the only one whose policy is the one that completions were drawn from.
            "drawn_difference": float(metrics[0].terms.drawn_difference),
            "gradient_norm": float(np.mean([each.gradient_norm for each in metrics])),
            **numbers,
            "engine_tokens_per_second": tokens / rollout.seconds_drawing,
            "seconds_drawing": rollout.seconds_drawing,
            "seconds_scoring": rollout.seconds_scoring,
            "seconds_updating": times["update"],
            "seconds": times["whole"],
        }
        if largest := [float(each.largest_logit) for each in metrics if each.largest_logit is not None]:
            record["largest_logit"] = max(largest)
        if self.settings.objective.kl_weight:
            record["kl"] = float(np.mean([each.terms.kl for each in metrics]))
        self.records.write_step(record)
        for each in metrics:
            if not each.applied:
                self.records.say(f"step {self.position.step}: loss or gradient not finite: an update was skipped")
        if is_first() and (self.config.training.evaluates_after(self.position.step) or self.position.step == 1):
            self.folder.samples.mkdir(exist_ok=True)
            page = sample_page(rollout, self.position.step)
            write_atomically(self.folder.samples / f"step-{self.position.step:06d}.txt", page)

    def _evaluate(self) -> float | None:
        """Answers the held-out problems and reports the result; None where the run was told to stop meanwhile."""
        found = self._answer_held_out()
        self.watchdog.progressed(by_a_step=False)
        if found is None:
            return None
        self.records.say(
            f"step {self.position.step}: {found.accuracy:.1%} of {len(self.held_out)} held-out problems right, "
            f"{found.length:.1f} tokens a completion"
        )
        self.records.write(
            {"step": self.position.step, "validation_accuracy": found.accuracy, "validation_length": found.length}
        )
        return found.accuracy

    def _answer_held_out(self) -> HeldOut | None:
        """Answers this process's share of the held-out problems, and returns the result on all of them."""
        own, new_tokens = (
            self.held_out[jax.process_index() :: jax.process_count()],
            self.settings.rollout.max_new_tokens,
        )
        found = answer_held_out(self.engine, self.tokenizer, own, new_tokens, self._stop_requested)
        parts = gather(b"" if found is None else json.dumps(dataclasses.astuple(found)).encode())
        return sum((HeldOut(*json.loads(part)) for part in parts), HeldOut(0, 0, 0)) if all(parts) else None

    def _save(self) -> None:
        if self.saved_step == self.position.step:
            return
        self.records.flush()
        pending = self.pending

        def write_more(folder: Path) -> None:
            write_atomically(folder / "grpo.json", json.dumps(self.settings.to_dict(), indent=1) + "\n")
            if pending is not None:
                write_rollout(folder, pending)

        self.checkpoints.save(self.state, self.position, self.config, write_more)
        self.saved_step = self.position.step

    def _write_results(self) -> None:
        records = read_metrics(self.folder.metrics)
        accuracies = {r["step"]: r["validation_accuracy"] for r in records if "validation_accuracy" in r}
        plot_rewards(records, self.folder.reward_plot, f"{self.config.preset}, {self.settings.rollout.task}")
        summary: dict[str, Any] = {
            "steps": self.position.step,
            "tokens": self.position.tokens,
            "accuracy_at_start": accuracies.get(0),
            "accuracy": accuracies.get(self.position.step),
        }
        write_atomically(self.folder.summary, json.dumps(summary, indent=1) + "\n")
        names = ", ".join(each.name for each in (self.folder.reward_plot, self.folder.metrics, self.folder.samples))
        self.records.say(f"results in {self.folder.path}: {names}")

    def _stop_requested(self) -> bool:
        """Returns whether this process was told to stop. The others hear of it when completions are gathered."""
        return self.interruption.requested

    def _interrupted(self) -> int:
        self._save()
        self.checkpoints.wait()
        self.records.say(f"stopped and saved at step {self.position.step}; run the same command to resume")
        # If another process was told to stop, this one exits with the code of SIGTERM.
        return self.interruption.exit_code if self.interruption.requested else 128 + signal.SIGTERM

    def _not_finite(self) -> int:
        self.checkpoints.wait()
        self.records.say(
            f"stopped at step {self.position.step}: {self.state_nonfinite} updates in a row had a loss or gradient "
            "that was not finite; try a lower --learning-rate"
        )
        return NOT_FINITE


def _check_lengths(config: RunConfig, settings: ReinforcementConfig, problems: ProblemSource) -> None:
    """Checks that held-out problems and those of the first step fit the model's context with their completions."""
    tokenizer, rollout = Tokenizer.load(config.data.tokenizer), settings.rollout
    some = [*problems.held_out(settings.held_out), *itertools.islice(problems.training(0), rollout.prompts)]
    longest = max(len(tokenizer.prompt_ids(problem.prompt)) for problem in some)
    context = config.model.max_position_embeddings
    if longest + rollout.max_new_tokens > context:
        raise UserError(
            f"a prompt of {longest} tokens and {rollout.max_new_tokens} new ones exceed the model's context of "
            f"{context}; give a smaller --max-new-tokens or shorter prompts"
        )


def _describe(record: Record, room: int) -> str:
    parts = [
        f"reward {record['reward']:.3f}",
        f"length {record['length']:.1f}",
        f"entropy {record['entropy']:.3f}",
        f"equal groups {record['equal_groups']}",
        f"clipped {record['clip_share']:.1%}",
        f"engine {record['engine_tokens_per_second']:,.0f} tokens/s",
        f"off by {record['drawn_difference']:.1e}",
    ]
    return joined(parts, room)
