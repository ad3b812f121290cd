"""The command `dsv3 grpo`: reinforcement learning with rewards that a rule computes."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from dsv3_jax.bounds import LARGEST_COUNT, check_bounds
from dsv3_jax.cli.options import notes, parse, text_of_file
from dsv3_jax.cli.run_options import run_together
from dsv3_jax.errors import UserError
from dsv3_jax.post_training.config import ReinforcementConfig
from dsv3_jax.post_training.grpo import GRPOConfig
from dsv3_jax.post_training.rewards import MODEL_KINDS, JudgeConfig
from dsv3_jax.post_training.rollouts import RolloutConfig
from dsv3_jax.post_training.tasks import TASKS, TaskSize
from dsv3_jax.runs.folder import by_dotted_name
from dsv3_jax.runs.peers import Peers
from dsv3_jax.runs.processes import Processes
from dsv3_jax.sharding.mesh import MeshConfig

_DESCRIPTION = f"""Train a model by reward: group relative policy optimization (report section 5.2.2).

In every step the engine draws a group of completions for each of some problems, from the weights as they are. A rule
scores them, and those better than the rest of their group become more likely. Problems are generated for a task
({", ".join(TASKS)}) or read from a file of JSON lines with
prompt, answer and reward; one in eight is held out, and the policy is tested on those.
If the folder --out already holds the same run, it is resumed.

Examples:
  dsv3 grpo runs/base --out runs/reasoning --task arithmetic
  dsv3 grpo runs/base --out runs/reasoning --task countdown --reward "countdown+0.1*format" --steps 200 --group 16
  dsv3 grpo runs/base --out runs/mine --task mine.jsonl --objective.kl-weight 0 --learning-rate 1e-5
  dsv3 grpo runs/base --out runs/mine --task code --minibatches 4 --objective.clip-above 0.28 --replay-experts
  dsv3 grpo runs/chat --out runs/helpful --task prompts.jsonl --reward model:runs/reward
  dsv3 grpo runs/base --out runs/mine --one-step-behind --objective.largest-correction 2
"""
_OF_THE_RUN: Any = tyro.conf.arg(help_behavior_hint="(default: the run's)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GRPOOptions:
    """The options of `dsv3 grpo` after the run, or checkpoint in the published layout, that the policy starts from.

    Attributes:
      out: folder of the new run.
      task: kind of generated problems, or a file of JSON lines with prompt, answer and reward.
      reward: sum of rewards, such as "numeric+0.1*format"; "model:FOLDER" is what a model of `dsv3 reward-model` says,
        "judge:FOLDER" the vote of a run, "judge:self" that of the policy.
      constitution: text file that tells a judge what is good.
      votes: verdicts of a judge on each completion.
      operands: most numbers in a generated problem.
      largest: largest number in a generated problem.
      steps: number of rollouts.
      prompts: problems of a step.
      group: completions of each problem.
      max_new_tokens: most tokens of a completion.
      overlong_penalty: subtracted from the reward of a completion that was cut at --max-new-tokens. (Completions that
        were cut can also be left out of the loss: --objective.no-count-overlong.)
      epochs: how often the completions of a step are read.
      minibatches: optimizer steps of each epoch.
      micro_batch_size: completions of a forward pass, which limits the memory of an update; 0 for a whole minibatch.
      optimizer: adamw or muon.
      qk_clip: largest attention logit of a head, as --training.qk-clip of dsv3 train; 0 for no clipping.
      learning_rate: peak learning rate, which is reached after --warmup of the steps.
      warmup: fraction of the steps in which the learning rate rises from 0.
      weight_decay: decoupled weight decay.
      replay_experts: use the experts that the engine chose for every token in the update.
      one_step_behind: draw the completions of the next step while the update of this one is computed.
      reference_every: replace the reference by the policy after every so many steps; 0 for never.
      held_out: number of held-out problems that the policy is tested on.
      evaluate_every: steps between tests on held-out problems, after which samples/ has a page of completions.
      checkpoint_every: steps between checkpoints; 0 for only at the end.
      log_every: print a line every so many steps, or never with 0.
      seed: of problems and draws.
      precision: float32, bfloat16, fp8 or auto, as of dsv3 train.
      objective: choices of the objective.
      mesh: number of devices along each mesh axis.
      processes: how several processes find each other; each draws the completions of its share of the problems.
    """

    out: Annotated[str, tyro.conf.arg(help_behavior_hint="(required)")] = ""
    task: str = "arithmetic"
    reward: Annotated[str, tyro.conf.arg(help_behavior_hint="(default: each problem's own)")] = ""
    constitution: Annotated[str, tyro.conf.arg(help_behavior_hint="(default: a sentence)")] = ""
    votes: int = 8
    operands: int = 3
    largest: int = 20
    steps: int = 100
    prompts: int = 16
    group: int = 8
    max_new_tokens: int = 64
    overlong_penalty: float = 0.0
    epochs: int = 1
    minibatches: int = 1
    micro_batch_size: int = 0
    optimizer: Annotated[Literal["adamw", "muon"] | None, _OF_THE_RUN] = None
    qk_clip: Annotated[float | None, _OF_THE_RUN] = None
    learning_rate: float = 1e-4
    warmup: float = 0.05
    weight_decay: float = 0.0
    replay_experts: bool = False
    one_step_behind: bool = False
    reference_every: int = 0
    held_out: int = 64
    evaluate_every: int = 10
    checkpoint_every: int = 50
    log_every: int = 1
    seed: int = 0
    precision: str = "auto"
    objective: GRPOConfig = dataclasses.field(default_factory=GRPOConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=lambda: MeshConfig(fsdp=-1))
    processes: Processes = dataclasses.field(default_factory=Processes)

    def __post_init__(self) -> None:
        bounds: dict[str, tuple[float, float]] = {"steps": (1, 10**7), "micro_batch_size": (0, LARGEST_COUNT)}
        check_bounds(self, bounds | {"learning_rate": (0.0, 1e6), "warmup": (0.0, 1.0)})

    def settings(self) -> ReinforcementConfig:
        """Returns rollouts and objective."""
        task = self.task if self.task in TASKS else os.path.abspath(self.task)
        written = {"constitution": text_of_file(Path(self.constitution))} if self.constitution else {}
        return ReinforcementConfig(
            rollout=RolloutConfig(
                task=task,
                size=TaskSize(operands=self.operands, largest=self.largest),
                reward=_with_absolute_folders(self.reward),
                judge=JudgeConfig(votes=self.votes, **written),
                **{name: getattr(self, name) for name in _OF_ROLLOUTS},
            ),
            objective=self.objective,
            **{name: getattr(self, name) for name in _OF_UPDATES},
        )


def _with_absolute_folders(reward: str) -> str:
    """Returns the reward with paths of models that are right in any folder, from which the run is resumed."""
    folders = re.compile(rf"\b({'|'.join(MODEL_KINDS)}):(?!self\b)([^+]+)")
    return folders.sub(lambda found: f"{found[1]}:{os.path.abspath(found[2].strip())}", reward)


_OF_ROLLOUTS = ("prompts", "group", "max_new_tokens", "overlong_penalty", "seed")
_OF_UPDATES = ("epochs", "minibatches", "replay_experts", "one_step_behind", "reference_every", "held_out")
_OF_TRAINING = (
    *("steps", "micro_batch_size", "learning_rate", "warmup", "weight_decay"),
    *("evaluate_every", "checkpoint_every", "log_every", "seed", "precision"),
)


def main(argv: list[str]) -> int:
    """Parses the options, trains, and returns the exit code.

    Raises:
      UserError: the options are wrong, or source, task or folder cannot be used.
    """
    run, *rest = argv if argv and not argv[0].startswith("-") else ["", *argv]
    options = parse(rest, prog="dsv3 grpo RUN", description=_DESCRIPTION, default=GRPOOptions())
    if not run:
        raise UserError("the run is missing: name it first, such as dsv3 grpo runs/base --out runs/reasoning")
    if not options.out:
        raise UserError("--out is missing: give the folder of the new run, such as --out runs/reasoning")
    settings = options.settings()
    source, out = Path(run), Path(options.out)
    if source.resolve() == out.resolve():
        raise UserError("--out must be another folder than that of the run that the policy starts from")
    # These imports are slow, so wrong arguments are reported before them.
    from dsv3_jax.runs.policy_run import policy_run

    with notes():
        given = {name: getattr(options, name) for name in ("optimizer", "qk_clip")}
        training = {name: getattr(options, name) for name in _OF_TRAINING}
        training |= {name: value for name, value in given.items() if value is not None}
        config = policy_run(source, settings, **training)
    config = dataclasses.replace(config, mesh=options.mesh)

    def run_policy(peers: Peers | None) -> int:
        from dsv3_jax.runs.reinforcement import reinforce

        return reinforce(config, settings, source, out, peers=peers)

    named = {"init_from": run, **by_dotted_name(settings.to_dict())}
    return run_together(config, options.out, options.processes, named, run_policy)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
