"""Shared code of the experiments that teach a model to work answers out: commands, data, held-out tests, tables."""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ablation import show, spread
from r1_zero_small import NEW_TOKENS, SIZE

from dsv3_jax import load_checkpoint
from dsv3_jax.cli.main import main as command
from dsv3_jax.inference import GREEDY, Engine, EngineConfig, Sampler
from dsv3_jax.post_training.rejection import SamplingConfig, sample
from dsv3_jax.post_training.tasks import Problem, distinct, generate_problems
from dsv3_jax.runs.folder import RunFolder

HELD_OUT = 240  # problems; there are about 260 of this size
KINDS = ("sums", "products")
_SAMPLES = 4  # answers of each problem at temperature 1
_TASK = ("--task", "arithmetic", "--operands", SIZE.operands, "--largest", SIZE.largest)


def call(*words: object) -> None:
    """Calls a command of `dsv3`; where it fails or is stopped, the experiment ends with its exit code."""
    print("$ dsv3", *words, flush=True)
    if exit_code := command([str(word) for word in words]):
        sys.exit(exit_code)


def fine_tune(source: Path, data: Path, out: Path, *, steps: int, seed: int, learning_rate: float = 1e-3) -> Path:
    """Fine-tunes the model of a run by `dsv3 sft`, unless `out` holds the finished run already; returns `out`."""
    if not RunFolder(out).summary.exists():
        fixed = ("--training.batch-size", 8, "--training.micro-batch-size", 0, "--sequence-length", 128)
        often = ("--training.log-every", 50, "--training.checkpoint-every", 0, "--training.seed", seed)
        options = ("--steps", steps, "--learning-rate", learning_rate, *fixed, *often)
        call("sft", source, "--data", data, "--out", out, *options)
    return out


def reinforce(source: Path, out: Path, *, steps: int, seed: int) -> Path:
    """Trains the model of a run by reward with `dsv3 grpo`, unless `out` holds the finished run; returns `out`."""
    if not RunFolder(out).summary.exists():
        drawn = (*_TASK, "--prompts", 16, "--group", 8, "--max-new-tokens", NEW_TOKENS, "--seed", seed)
        often = ("--held-out", 64, "--evaluate-every", 10, "--checkpoint-every", 20, "--log-every", 5)
        options = ("--steps", steps, "--learning-rate", 3e-4, "--objective.kl-weight", 0, *drawn, *often)
        call("grpo", source, "--out", out, *options)
    return out


def draw_right(run: Path, out: Path, *, problems: int, samples: int, seed: int) -> Path:
    """Draws answers by `dsv3 sample` and keeps the shortest right one of each problem; returns the file `out`."""
    drawn = ("--count", problems, "--samples", samples, "--max-new-tokens", NEW_TOKENS, "--seed", seed)
    call("sample", run, "--out", out, *_TASK, *drawn)
    return out


def write_samples(out: Path, samples: Iterable[Mapping[str, Any]]) -> Path:
    """Writes samples, such as {"prompt": ..., "completion": ...}, as data for `dsv3 sft`; returns the file `out`."""
    out.write_text("".join(json.dumps(each) + "\n" for each in samples), encoding="utf-8")
    return out


def read_kept(path: Path) -> list[dict[str, Any]]:
    """Returns the lines that `dsv3 sample` wrote of answers that it kept: prompt, completion, answer and scores."""
    values = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [value for value in values if "completion" in value]


@dataclasses.dataclass(frozen=True)
class Score:
    """The answers of a model to held-out problems of one kind.

    Attributes:
      accuracy: share of right answers, each made of the most likely tokens.
      length: mean number of tokens of those answers.
      drawn_accuracy: mean share of right answers among those drawn at temperature 1, which R1 calls pass@1.
    """

    accuracy: float
    length: float
    drawn_accuracy: float


def kind_of(problem: Problem) -> str:
    """Returns "products" for a problem that multiplies, for which the order of the steps matters, else "sums"."""
    return "products" if "*" in problem.prompt else "sums"


def held_out(run: Path) -> dict[str, Score]:
    """Returns the scores of a finished run on the held-out problems of each kind, and on "all".

    They are kept in the run's folder, and read from there the next time.
    """
    kept = run / "held-out.json"
    if kept.exists():
        return {kind: Score(**values) for kind, values in json.loads(kept.read_text()).items()}
    model, tokenizer, _ = load_checkpoint(run)
    rows = min(64, HELD_OUT)
    engine = Engine(model, EngineConfig(max_sequences=rows, context=128, chunk_rows=8, drafts=0, top_logprobs=1))
    problems = distinct(generate_problems("arithmetic", "held-out", 0, SIZE), HELD_OUT)
    ways = {"likely": (1, GREEDY), "drawn": (_SAMPLES, Sampler())}
    rows: dict[str, list[tuple[Problem, float, float]]] = {}
    for name, (count, sampler) in ways.items():
        config = SamplingConfig(samples=count, max_new_tokens=NEW_TOKENS, sampler=sampler)
        rows[name] = [
            (problem, _right([each.scores["reward"] for each in some]), statistics.fmean(len(c.ids) for c in some))
            for problem, some in sample(engine, tokenizer, problems, config)
        ]

    def score(kinds: Sequence[str]) -> Score:
        likely, drawn = ([row for row in rows[name] if kind_of(row[0]) in kinds] for name in ways)
        shares = [statistics.fmean(right for _, right, _ in some) for some in (likely, drawn)]
        return Score(shares[0], statistics.fmean(length for *_, length in likely), shares[1])

    scores = {"all": score(KINDS)} | {kind: score([kind]) for kind in KINDS}
    kept.write_text(json.dumps({kind: dataclasses.asdict(each) for kind, each in scores.items()}) + "\n")
    return scores


def table(stages: Mapping[str, Sequence[Mapping[str, Score]]]) -> dict[str, Any]:
    """Returns the spread over the seeds of every score of each stage, for JSON.

    Args:
      stages: for each stage and seed, the scores by kind.
    """
    fields = [field.name for field in dataclasses.fields(Score)]
    return {
        stage: {
            kind: {field: spread([getattr(scores[kind], field) for scores in by_seed]) for field in fields}
            for kind in ("all", *KINDS)
        }
        for stage, by_seed in stages.items()
    }


def describe(numbers: Mapping[str, Any], kinds: Iterable[str] = ("all", *KINDS)) -> str:
    """Returns the table as lines of text: for each stage and kind, accuracy, length, and accuracy of drawn answers."""
    kinds = tuple(kinds)
    width = max(map(len, numbers))
    lines = [" " * width + "".join(f"  {kind + ': right, tokens, drawn right':40}" for kind in kinds)]
    for stage, of_stage in numbers.items():
        cells = []
        for kind in kinds:
            values = of_stage[kind]
            parts = (show(values["accuracy"], 2), show(values["length"], 1), show(values["drawn_accuracy"], 2))
            cells.append(f"  {', '.join(parts):40}")
        lines.append(f"{stage:{width}}" + "".join(cells))
    return "\n".join(line.rstrip() for line in lines)


def _right(rewards: Sequence[float]) -> float:
    return statistics.fmean(reward >= 1 for reward in rewards)
