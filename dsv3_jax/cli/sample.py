"""The command `dsv3 sample`: rejection sampling from a run."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv3_jax.bounds import LARGEST_COUNT
from dsv3_jax.cli.options import OptionParser, notes, number, text_of_file
from dsv3_jax.errors import UserError
from dsv3_jax.terminal import say

if TYPE_CHECKING:
    from dsv3_jax.post_training.rejection import Completion
    from dsv3_jax.post_training.rewards import JudgeConfig
    from dsv3_jax.post_training.tasks import Problem

_PROBLEMS_AT_A_TIME = 16
_DESCRIPTION = """Draw completions of problems with the newest checkpoint of a run, score them, and keep the good ones.

What is kept goes to --out as JSON lines with prompt, completion and scores: data for fine-tuning. The same command goes
on where it was interrupted: problems whose outcome is in --out already are left out.

examples:
  dsv3 sample runs/nano --task arithmetic --count 100 --samples 8 --out right.jsonl
  dsv3 sample runs/nano --problems mine.jsonl --reward "numeric+0.1*format" --keep best --out best.jsonl
"""


def main(argv: list[str]) -> int:
    """Writes what is kept and prints how many completions were right; returns the exit code.

    Raises:
      UserError: the arguments are wrong, the run has no usable checkpoint, or a prompt does not fit the context.
    """
    arguments = _parse(argv)
    from dsv3_jax.post_training.rewards import Reward

    reward = Reward.of(arguments.reward) if arguments.reward else None
    problems = _problems(arguments)
    done = _prompts_in(arguments.out)
    problems = [problem for problem in problems if problem.prompt not in done]
    if done:
        say(f"{arguments.out}: {len(done)} problems are there already; {len(problems)} are left", to=sys.stderr)
    if not problems:
        return 0
    # These imports are slow, so wrong arguments are reported before them.
    from dsv3_jax.cli.compilation_cache import keep_compiled_programs
    from dsv3_jax.inference import Engine, EngineConfig, Sampler
    from dsv3_jax.post_training.rejection import SamplingConfig, keep, sample
    from dsv3_jax.runs.checkpoints import load_checkpoint
    from dsv3_jax.runs.model_rewards import with_loaded_models

    keep_compiled_programs()
    with notes():
        model, tokenizer, step = load_checkpoint(arguments.run, step=arguments.step)
    say(f"sampling {arguments.samples} completions of {len(problems)} problems from step {step}", to=sys.stderr)
    engine = Engine(model, EngineConfig(max_sequences=min(32, arguments.samples * _PROBLEMS_AT_A_TIME)))
    reward = with_loaded_models(reward, _judge(arguments), engine, tokenizer)
    config = SamplingConfig(
        samples=arguments.samples,
        max_new_tokens=arguments.max_new_tokens,
        sampler=Sampler(temperature=arguments.temperature, top_p=arguments.top_p),
        seed=arguments.seed,
        reward=reward,
    )
    right = kept_count = drawn = 0
    _end_line(arguments.out)
    with arguments.out.open("a", encoding="utf-8") as file:
        for some in itertools.batched(problems, _PROBLEMS_AT_A_TIME):
            for problem, completions in sample(engine, tokenizer, some, config):
                kept = keep(completions, arguments.keep, arguments.least)
                right += sum(completion.scores["reward"] >= arguments.least for completion in completions)
                drawn, kept_count = drawn + len(completions), kept_count + len(kept)
                file.writelines(_lines(problem, kept))
            file.flush()
            print(f"{drawn} completions, {right} right ({right / drawn:.1%}), {kept_count} kept", flush=True)
    return 0


def _lines(problem: Problem, kept: Iterable[Completion]) -> list[str]:
    """Returns a line per completion that is kept, or one that says that none was."""
    values: list[dict[str, Any]] = [
        {"prompt": problem.prompt, "completion": c.text, "answer": problem.answer, "cut": c.cut, **c.scores}
        for c in kept
    ]
    return [json.dumps(value, ensure_ascii=False) + "\n" for value in values or [{"rejected": problem.prompt}]]


def _end_line(path: Path) -> None:
    """Ends a last line that an interruption cut off, so that the next one is whole."""
    with path.open("ab+") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(end - 1, 0))
        if end and file.read(1) != b"\n":
            file.write(b"\n")


def _prompts_in(path: Path) -> set[str]:
    """Returns the prompts whose outcome a file holds. A line that was cut off by an interruption is not counted."""
    if not path.exists():
        return set()
    prompts = set()
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                value = json.loads(line)
                prompts.add(value.get("prompt") or value["rejected"])
            except (ValueError, KeyError, AttributeError):
                continue
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}; choose another --out") from error
    return prompts


def _judge(arguments: argparse.Namespace) -> JudgeConfig:
    from dsv3_jax.post_training.rewards import JudgeConfig

    given = {"constitution": text_of_file(arguments.constitution)} if arguments.constitution else {}
    return JudgeConfig(votes=arguments.votes, **given)


def _problems(arguments: argparse.Namespace) -> list[Problem]:
    from dsv3_jax.post_training.tasks import TaskSize, distinct, generate_problems, read_problems

    if arguments.problems is not None:
        return read_problems(arguments.problems)[: arguments.count]
    size = TaskSize(operands=arguments.operands, largest=arguments.largest)
    return distinct(generate_problems(arguments.task, arguments.split, arguments.seed, size), arguments.count)


def _parse(argv: list[str]) -> argparse.Namespace:
    from dsv3_jax.post_training.tasks import TASKS

    parser = OptionParser("dsv3 sample", _DESCRIPTION)
    parser.add_argument("run", type=Path, help="folder of a training run")
    parser.add_argument("--step", type=number(int, 0, 10**18), help="step of the checkpoint (default: the newest)")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--task", choices=list(TASKS), help="generate problems of this kind")
    source.add_argument("--problems", type=Path, help="file of JSON lines with prompt, answer and reward")
    parser.add_argument("--out", type=Path, required=True, help="file that what is kept is added to")
    parser.add_argument(
        "--count", type=number(int, 1, LARGEST_COUNT), default=100, help="number of problems (default: 100)"
    )
    parser.add_argument(
        "--samples", type=number(int, 1, 10_000), default=4, help="completions of each problem (default: 4)"
    )
    parser.add_argument(
        "--keep",
        choices=["shortest-right", "best", "all"],
        default="shortest-right",
        help="which completions of a problem are kept (default: the shortest that is right)",
    )
    parser.add_argument(
        "--least",
        type=number(float, -1e6, 1e6),
        default=1.0,
        help="least reward of a completion that counts as right (default: 1)",
    )
    parser.add_argument(
        "--reward",
        help="sum of rewards, such as numeric+0.1*format, or model:FOLDER for a reward model "
        "(default: the problem's own)",
    )
    parser.add_argument(
        "--constitution", type=Path, help="text file that tells a judge what is good (default: a short one)"
    )
    parser.add_argument(
        "--votes", type=number(int, 1, 10_000), default=8, help="verdicts of a judge on a completion (default: 8)"
    )
    parser.add_argument(
        "--split",
        choices=["train", "held-out"],
        default="train",
        help="problems of a task to train on, or those that are held out (default: train)",
    )
    parser.add_argument("--operands", type=number(int, 2, 8), default=3, help="most numbers in a problem (default: 3)")
    parser.add_argument(
        "--largest", type=number(int, 2, 10**9), default=20, help="largest number in a problem (default: 20)"
    )
    parser.add_argument(
        "--max-new-tokens", type=number(int, 1, 2**24), default=64, help="most tokens of a completion (default: 64)"
    )
    parser.add_argument(
        "--temperature",
        type=number(float, 0, 1e6),
        default=1.0,
        help="divides the logits before a token is drawn (default: 1)",
    )
    parser.add_argument(
        "--top-p",
        type=number(float, 0, 1),
        help="draw from the fewest most likely tokens whose probabilities sum to at least this (default: from all)",
    )
    parser.add_argument(
        "--seed", type=number(int, 0, 2**32 - 1), default=0, help="random seed of problems and draws (default: 0)"
    )
    arguments = parser.parse_args(argv)
    if arguments.out.is_dir() or not arguments.out.parent.is_dir():
        raise UserError(f"--out {arguments.out} must be a file in a folder that exists")
    return arguments
