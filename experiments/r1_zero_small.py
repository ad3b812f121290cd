"""Does reasoning grow from rewards alone? DeepSeek-R1-Zero (R1 report, section 2.2) at a size that a laptop trains.

A base model is trained on problems of arithmetic with two kinds of answers. Three quarters of the texts answer at once
with the first two numbers of the problem side by side, which is almost never right: "4 + 3 * 5 = \\boxed{43}". The rest
work the answer out: "4 + 3 * 5 = 3 * 5 = 15, 4 + 15 = 19. \\boxed{19}". So the base model knows both forms, prefers the
first, and is seldom right. GRPO then rewards right numbers and nothing else: no example is shown, and no reward says
that working an answer out is good.

R1-Zero's curves are looked for: accuracy on held-out problems rises, and so does the length of the answers.

    python experiments/r1_zero_small.py --seeds 0 1 2
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
from ablation import (
    Options,
    byte_data,
    new_figure,
    parse_options,
    run_arm,
    run_of,
    show,
    smoothed,
    spread,
    write_results,
)

from dsv3_jax.cli.compilation_cache import keep_compiled_programs
from dsv3_jax.post_training.config import ReinforcementConfig
from dsv3_jax.post_training.grpo import GRPOConfig
from dsv3_jax.post_training.rollouts import RolloutConfig
from dsv3_jax.post_training.tasks import Problem, TaskSize, generate_problems
from dsv3_jax.runs.folder import RunFolder
from dsv3_jax.runs.metrics import Record, read_metrics
from dsv3_jax.runs.policy_run import policy_run
from dsv3_jax.runs.reinforcement import reinforce

SIZE = TaskSize(operands=3, largest=5)
TEXTS = 60_000
WORKED = 0.25  # share of the base model's texts that work the answer out
NEW_TOKENS = 48


def main(argv: list[str] | None = None) -> None:
    options = parse_options("r1_zero_small", __doc__, argv, seeds=1)
    keep_compiled_programs()
    results = [read_metrics(RunFolder(train_policy(options, seed)).metrics) for seed in options.seeds]
    first = [spread([records[0][name] for records in results]) for name in ("validation_accuracy", "validation_length")]
    last = [spread([records[-1][name] for records in results]) for name in ("validation_accuracy", "validation_length")]
    holds = max(first[0]["values"]) < 0.25 and min(last[0]["values"]) > 0.8
    longer = all(records[-1]["validation_length"] > records[0]["validation_length"] for records in results)
    verdict = (
        f"{'Holds' if holds and longer else 'Does not hold'}: with rewards for right numbers alone, the share of "
        f"held-out problems answered rightly goes from {show(first[0], 2)} to {show(last[0], 2)}, and the length of an "
        f"answer from {show(first[1], 1)} to {show(last[1], 1)} tokens."
    )
    figure, panels = new_figure(3, width=4.2)
    for axis, (drawn, held_out, label) in zip(panels, _CURVES, strict=True):
        for seed, records in zip(options.seeds, results, strict=True):
            steps = [record for record in records if drawn in record]
            axis.plot([r["step"] for r in steps], smoothed([r[drawn] for r in steps]), label=f"drawn, seed {seed}")
            tests = [record for record in records if held_out in record]
            axis.plot([r["step"] for r in tests], [r[held_out] for r in tests], "o--", markersize=3, label="held out")
        axis.set(xlabel="step", ylabel=label)
        axis.grid(alpha=0.25)
    panels[0].legend(fontsize=7)
    numbers = {
        "accuracy": {"before": first[0], "after": last[0]},
        "length": {"before": first[1], "after": last[1]},
        "drawn": {name: spread([records[-2][name] for records in results]) for name in ("reward", "entropy", "length")},
        "curves": {
            str(seed): [[r["step"], r["validation_accuracy"], r["validation_length"]] for r in records if _tested(r)]
            for seed, records in zip(options.seeds, results, strict=True)
        },
    }
    write_results(options, {options.name: figure}, verdict, numbers)


_CURVES = (
    ("reward", "validation_accuracy", "share of right answers"),
    ("length", "validation_length", "tokens of an answer"),
    ("entropy", "", "entropy, nats per token"),
)


def _tested(record: Record) -> bool:
    return "validation_accuracy" in record


def train_policy(options: Options, seed: int) -> Path:
    """Trains the base model and the policy of a seed, unless they are there; returns the folder of the policy."""
    base, policy = train_base(options, seed), options.runs / f"policy-{seed}"
    settings = ReinforcementConfig(
        rollout=RolloutConfig(task="arithmetic", size=SIZE, prompts=16, group=16, max_new_tokens=NEW_TOKENS, seed=seed),
        objective=GRPOConfig(kl_weight=0.0),
        held_out=200,
    )
    config = policy_run(
        base, settings, steps=options.steps or 120, learning_rate=3e-4, evaluate_every=10, checkpoint_every=50
    )
    if not RunFolder(policy).summary.exists() and (exit_code := reinforce(config, settings, base, policy)):
        sys.exit(exit_code)
    return policy


def train_base(options: Options, seed: int) -> Path:
    """Trains the base model of a seed, unless it is there; returns its folder."""
    run = run_of(options, seed, steps=8000)
    data = byte_data(write_texts(options.runs / "texts.jsonl"), length=128, seed=seed)
    config = dataclasses.replace(run, data=data, model=run.model.replace(num_nextn_predict_layers=0))
    return run_arm(config, options.runs / f"base-{seed}").folder


def write_texts(path: Path, count: int = TEXTS) -> Path:
    """Writes problems with quick and worked answers as JSON lines, unless `path` exists; returns it."""
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    problems = generate_problems("arithmetic", "train", 12345, SIZE)
    texts = []
    for _ in range(count):
        problem = next(problems)
        worked = random.random() < WORKED
        answer = worked_answer(problem) if worked else quick_answer(problem)
        texts.append(json.dumps({"text": problem.prompt + answer}) + "\n")
    path.write_text("".join(texts))
    return path


def quick_answer(problem: Problem) -> str:
    """Returns the first two numbers of the problem side by side, in a box."""
    first, _, second, *_ = problem.prompt.split()
    return f"\\boxed{{{first}{second}}}"


def worked_answer(problem: Problem) -> str:
    """Returns the steps of a calculation, products first, and its result in a box."""
    words = problem.prompt.removesuffix(" = ").split()
    steps = []
    while len(words) > 1:
        at = words.index("*") if "*" in words else 1
        left, sign, right = words[at - 1 : at + 2]
        a, b = int(left), int(right)
        words[at - 1 : at + 2] = [str({"+": a + b, "-": a - b, "*": a * b}[sign])]
        steps.append(f"{left} {sign} {right} = {words[at - 1]}")
    return f"{', '.join(steps)}. \\boxed{{{words[0]}}}"


if __name__ == "__main__":
    main()
