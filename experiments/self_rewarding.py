"""Can a model reward itself by voting under a written constitution (report section 5.4.2), at a size a laptop trains?

A base model is trained on texts of two kinds. Some answer a problem of arithmetic, most of them at once and almost
never right, the others by working it out. The rest are judgements: a constitution of one sentence, a problem, an
answer, and "yes" or "no". One constitution calls good what is right, the other what is short.

GRPO then trains the model with no reward but its own: for every completion it is asked four times, with the weights of
the moment, whether the answer is good under one of the two constitutions, and the reward is the share of "yes". No rule
that knows the right answer is used, except to test the result on held-out problems. The report's claim is looked for:
the model moves in the direction of the constitution it is given.

    python experiments/self_rewarding.py [--seeds 0]
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from pathlib import Path
from typing import Any

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
from r1_zero_small import NEW_TOKENS, SIZE, quick_answer, worked_answer

from dsv3_jax import load_checkpoint
from dsv3_jax.cli.compilation_cache import keep_compiled_programs
from dsv3_jax.inference import Engine, EngineConfig
from dsv3_jax.post_training.config import ReinforcementConfig
from dsv3_jax.post_training.grpo import GRPOConfig
from dsv3_jax.post_training.judging import Judge, judgement_prompt
from dsv3_jax.post_training.rewards import JudgeConfig, numeric
from dsv3_jax.post_training.rollouts import RolloutConfig
from dsv3_jax.post_training.tasks import Problem, distinct, generate_problems
from dsv3_jax.runs.folder import RunFolder
from dsv3_jax.runs.metrics import Record, read_metrics
from dsv3_jax.runs.policy_run import policy_run
from dsv3_jax.runs.reinforcement import reinforce
from dsv3_jax.training.config import RunConfig

CONSTITUTIONS = {"right": "Good is what is right.", "short": "Good is what is short."}
KINDS = ("short", "right", "wrong")  # of answers that are judged: at once, worked out, worked out with a mistake
LENGTH = 128  # tokens of a row; a judgement has at most 115
TEXTS = 80_000
JUDGEMENTS = 0.6  # share of the base model's texts
WORKED = 0.25  # share of the texts that answer a problem
VOTES = 4


def main(argv: list[str] | None = None) -> None:
    options = parse_options("self_rewarding", __doc__, argv, seeds=1)
    keep_compiled_programs()
    judged, curves = [], {name: [] for name in CONSTITUTIONS}
    for seed in options.seeds:
        base = options.runs / f"base-{seed}"
        run_arm(_base(options, seed), base)
        judged.append(judgement_accuracy(base))
        for name, constitution in CONSTITUTIONS.items():
            curves[name].append(_train(options, seed, base, name, constitution))
    numbers: dict[str, Any] = {
        "judgements": {key: spread([each[key] for each in judged]) for key in judged[0]},
        **{name: _summary(records) for name, records in curves.items()},
    }
    figure, panels = new_figure(3, width=4.2)
    for axis, (drawn, held_out, label) in zip(panels, _CURVES, strict=True):
        for name, runs in curves.items():
            steps = [record for record in runs[0] if "reward" in record]
            axis.plot([r["step"] for r in steps], smoothed([r[drawn] for r in steps]), label=f"good is {name}")
            tests = [record for record in runs[0] if held_out in record]
            axis.plot([r["step"] for r in tests], [r[held_out] for r in tests], "o--", markersize=3, label="held out")
        axis.set(xlabel="step", ylabel=label)
        axis.grid(alpha=0.25)
    panels[0].legend(fontsize=7)
    write_results(options, {options.name: figure}, _verdict(numbers), numbers)


_CURVES = (
    ("reward", "validation_accuracy", "reward by votes; share right, held out"),
    ("length", "validation_length", "tokens of an answer"),
    ("entropy", "", "entropy, nats per token"),
)


def _summary(runs: list[list[Record]]) -> dict[str, Any]:
    """Returns reward, accuracy and length before and after, one value per seed."""
    found = {}
    for name in ("validation_accuracy", "validation_length", "reward"):
        values = [[record[name] for record in records if name in record] for records in runs]
        found[name] = {"before": spread([each[0] for each in values]), "after": spread([each[-1] for each in values])}
    return found


def _verdict(numbers: dict[str, Any]) -> str:
    """Returns the result in words."""
    right, short = numbers["right"], numbers["short"]
    accuracy, lengths = right["validation_accuracy"], [each["validation_length"] for each in (right, short)]
    directed = min(accuracy["after"]["values"]) > 2 * max(accuracy["before"]["values"]) and all(
        longer > shorter for longer, shorter in zip(*(each["after"]["values"] for each in lengths), strict=True)
    )
    one, many = (numbers["judgements"][f"{votes} votes"] for votes in (1, 9))
    return (
        f"{'Holds' if directed else 'Does not hold'}: rewarded by its own votes on what is right, the model answers "
        f"{show(accuracy['before'], 2)} of held-out problems rightly before and {show(accuracy['after'], 2)} after, "
        f"with {show(lengths[0]['after'], 1)} tokens; rewarded by its votes on what is short, "
        f"{show(short['validation_accuracy']['after'], 2)} with {show(lengths[1]['after'], 1)} tokens. As a judge of "
        f"what is right the base model is right in {show(one, 2)} of single verdicts and in {show(many, 2)} of "
        f"majorities of nine; its own mean reward ends at {show(right['reward']['after'], 2)}."
    )


def _train(options: Options, seed: int, base: Path, name: str, constitution: str) -> list[Record]:
    """Trains the policy of a seed and a constitution, or reads what is there; returns its records."""
    policy = options.runs / f"{name}-{seed}"
    settings = ReinforcementConfig(
        rollout=RolloutConfig(
            task="arithmetic",
            size=SIZE,
            reward="judge:self",
            judge=JudgeConfig(constitution=constitution, votes=VOTES),
            prompts=8,
            group=8,
            max_new_tokens=NEW_TOKENS,
            seed=seed,
        ),
        objective=GRPOConfig(kl_weight=0.0),
        held_out=100,
    )
    config = policy_run(
        base, settings, steps=options.steps or 60, learning_rate=3e-4, evaluate_every=10, checkpoint_every=20
    )
    if not RunFolder(policy).summary.exists() and (exit_code := reinforce(config, settings, base, policy)):
        sys.exit(exit_code)
    return read_metrics(RunFolder(policy).metrics)


def judgement_accuracy(base: Path, problems: int = 60) -> dict[str, float]:
    """Returns how often single verdicts and majorities judge rightly what is right, on held-out problems."""
    model, tokenizer, _ = load_checkpoint(base)
    engine = Engine(model, EngineConfig(max_sequences=32))
    random = np.random.default_rng(1)
    some = distinct(generate_problems("arithmetic", "held-out", 77, SIZE), problems)
    items = [(each.prompt, answer_of(each, kind, random), each.answer) for each in some for kind in KINDS]
    truth = np.array([numeric(*item) for item in items])
    found = {}
    for votes in (1, 9):
        shares = np.array(Judge(engine, tokenizer, CONSTITUTIONS["right"], votes)(items))
        found[f"{votes} votes"] = float(np.mean((shares > 0.5) == truth))
    return found


def _base(options: Options, seed: int) -> RunConfig:
    """Returns the run of the base model."""
    run = run_of(options, seed, steps=6000)
    data = byte_data(write_texts(options.runs / "texts.jsonl"), length=LENGTH, seed=seed)
    training = dataclasses.replace(run.training, checkpoint_every=1000)
    model = run.model.replace(num_nextn_predict_layers=0, max_position_embeddings=LENGTH + 64)
    return dataclasses.replace(run, data=data, model=model, training=training)


def write_texts(path: Path, count: int = TEXTS) -> Path:
    """Writes answered problems and judgements as JSON lines, unless `path` exists; returns it."""
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    problems = generate_problems("arithmetic", "train", 12345, SIZE)
    texts = []
    for problem in itertools.islice(problems, count):
        if random.random() < JUDGEMENTS:
            name = str(random.choice(list(CONSTITUTIONS)))
            kind = str(random.choice(KINDS))
            answer = answer_of(problem, kind, random)
            good = kind == "short" if name == "short" else numeric(problem.prompt, answer, problem.answer) == 1
            text = judgement_prompt(CONSTITUTIONS[name], problem.prompt, answer) + ("yes" if good else "no")
        else:
            text = problem.prompt + answer_of(problem, "right" if random.random() < WORKED else "short", random)
        texts.append(json.dumps({"text": text}) + "\n")
    path.write_text("".join(texts))
    return path


def answer_of(problem: Problem, kind: str, random: np.random.Generator) -> str:
    """Returns an answer of a kind: at once ("short"), worked out ("right"), or worked out to a wrong end ("wrong")."""
    if kind == "short":
        return quick_answer(problem)
    answer = worked_answer(problem)
    if kind == "right":
        return answer
    calculation, _, result = answer.rpartition(" \\boxed{")
    before, _, last = calculation.removesuffix(".").rpartition(" = ")
    wrong = str(int(last) + int(random.choice([-3, -2, -1, 1, 2, 3])))
    assert last == result.removesuffix("}")
    return f"{before} = {wrong}. \\boxed{{{wrong}}}"


if __name__ == "__main__":
    main()
