"""The stages of DeepSeek-R1 (R1 report, section 2.3) at a size that a laptop trains.

    python experiments/sft_then_rl.py --seeds 0 1

The stages, each by one command of `dsv3`:

    cold start           the base model is fine-tuned on a few worked answers (sft)
    reinforcement        and trained by reward for right numbers alone (grpo)
    rejection sampling   that model answers the training problems, and the right answers are kept (sample); the base
                         model, not the model of the stage before, is fine-tuned on them (sft)
    reinforcement again  and trained by reward once more (grpo)

The base model is that of r1_zero_small.py: it has seen worked answers, but mostly answers at once, and wrongly. Each
stage is tested on the same held-out problems. R1's second reinforcement also rewards helpfulness and harmlessness,
for which there is nothing here to measure.
"""

from __future__ import annotations

import itertools
from pathlib import Path

from ablation import Options, new_figure, parse_options, show, write_results
from r1_zero_small import SIZE, train_base, worked_answer
from reasoning import Score, describe, draw_right, fine_tune, held_out, reinforce, table, write_samples

from dsv3_jax.cli.compilation_cache import keep_compiled_programs
from dsv3_jax.post_training.tasks import generate_problems

STAGES = ("base", "cold start", "reinforcement", "rejection sampling", "reinforcement again")
EXAMPLES = 64  # worked answers of the cold start
PROBLEMS = 1000  # that are answered for rejection sampling


def main(argv: list[str] | None = None) -> None:
    options = parse_options("sft_then_rl", __doc__, argv, seeds=1, runs_of="r1_zero_small")
    keep_compiled_programs()
    by_seed = [_stages(options, seed) for seed in options.seeds]
    numbers = table({stage: [scores[stage] for scores in by_seed] for stage in STAGES})
    accuracies = [numbers[stage]["all"]["drawn_accuracy"] for stage in STAGES]
    rises = all(
        later > earlier
        for scores in by_seed
        for earlier, later in itertools.pairwise(scores[stage]["all"].drawn_accuracy for stage in STAGES)
    )
    verdict = (
        f"{'Holds' if rises else 'Holds in part' if _ends_best(by_seed) else 'Does not hold'}: the share of right "
        "answers to held-out problems, drawn at temperature 1, is "
        + ", ".join(f"{show(accuracy, 2)} ({stage})" for stage, accuracy in zip(STAGES, accuracies, strict=True))
        + "."
    )
    figure, (axis,) = new_figure(1, width=6.4)
    for field, label in (("drawn_accuracy", "drawn at temperature 1"), ("accuracy", "most likely answer")):
        spreads = [numbers[stage]["all"][field] for stage in STAGES]
        errors = [each["standard_deviation"] or 0.0 for each in spreads]
        axis.errorbar(range(len(STAGES)), [each["mean"] for each in spreads], errors, marker="o", label=label)
    axis.set_xticks(range(len(STAGES)), [stage.replace(" ", "\n") for stage in STAGES], fontsize=8)
    axis.set(ylabel="right answers to held-out problems", ylim=(0, 1))
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)
    print(describe(numbers))
    write_results(options, {options.name: figure}, verdict, {"stages": numbers})


def _stages(options: Options, seed: int) -> dict[str, dict[str, Score]]:
    """Returns the scores after each stage with a seed; runs what has not been run."""
    base, folder = train_base(options, seed), options.runs / f"sft_then_rl-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    steps = options.steps or 30
    cold = fine_tune(base, _examples(folder / "examples.jsonl", seed), folder / "cold-start", steps=steps, seed=seed)
    first = reinforce(cold, folder / "reinforcement", steps=steps, seed=seed)
    right = draw_right(first, folder / "right.jsonl", problems=PROBLEMS, samples=4, seed=seed)
    tuned = fine_tune(base, right, folder / "rejection-sampling", steps=options.steps or 400, seed=seed)
    second = reinforce(tuned, folder / "reinforcement-again", steps=steps, seed=seed + 1)
    return {stage: held_out(run) for stage, run in zip(STAGES, (base, cold, first, tuned, second), strict=True)}


def _ends_best(by_seed: list[dict[str, dict[str, Score]]]) -> bool:
    """Returns whether the last stage is the best one with every seed."""
    return all(
        scores[STAGES[-1]]["all"].drawn_accuracy == max(scores[stage]["all"].drawn_accuracy for stage in STAGES)
        for scores in by_seed
    )


def _examples(path: Path, seed: int) -> Path:
    """Writes worked answers of some problems as data for `dsv3 sft`; returns `path`."""
    problems = itertools.islice(generate_problems("arithmetic", "train", seed, SIZE), EXAMPLES)
    return write_samples(path, ({"prompt": each.prompt, "completion": worked_answer(each)} for each in problems))


if __name__ == "__main__":
    main()
