"""Is a model better after fine-tuning on a reasoning model's long answers than on short ones? (section 5.4.1, table 9)

    python experiments/distillation.py --seeds 0 1

The report fine-tunes DeepSeek-V2.5 on short chains of thought, and on answers of expert models that were trained by
reinforcement learning from DeepSeek-R1. The latter is better, and its answers are longer: 74.6% and 83.2% of MATH-500
with 769 and 1,510 tokens, 31.1% and 37.4% of LiveCodeBench with 718 and 783.

Here the student is the base model of r1_zero_small.py, and the teacher the policy that the same script trains; both are
made if `--runs` does not hold them. The teacher answers problems of the training split (`dsv3 sample`), of which
the right ones are kept. One student is fine-tuned on these (`dsv3 sft`), the other on the bare right numbers of
the same problems, for as many steps. The two columns of the table are problems with and without products.
"""

from __future__ import annotations

from ablation import Options, legend_below, new_figure, paired, parse_options, show, write_results
from r1_zero_small import train_base, train_policy
from reasoning import KINDS, Score, describe, draw_right, fine_tune, held_out, read_kept, table, write_samples

from dsv3_jax.cli.compilation_cache import keep_compiled_programs

PROBLEMS = 1000  # that the teacher is asked
ARMS = ("base", "short", "long", "teacher")
_TITLES = {"base": "student before", "short": "on short answers", "long": "on the teacher's", "teacher": "teacher"}


def main(argv: list[str] | None = None) -> None:
    options = parse_options("distillation", __doc__, argv, seeds=1, runs_of="r1_zero_small")
    keep_compiled_programs()
    scores = [_scores(options, seed) for seed in options.seeds]
    by_arm = {arm: [of_seed[arm] for of_seed in scores] for arm in ARMS}
    numbers = table(by_arm)
    gain, longer = (
        paired(
            [getattr(score["all"], field) for score in by_arm["long"]],
            [getattr(score["all"], field) for score in by_arm["short"]],
        )
        for field in ("accuracy", "length")
    )
    holds = min(gain["values"]) > 0 and min(longer["values"]) > 0
    short, long = numbers["short"]["all"], numbers["long"]["all"]
    verdict = (
        f"{'Holds' if holds else 'Does not hold'}: fine-tuned on the teacher's worked answers, the student answers "
        f"{show(long['accuracy'], 2)} of the held-out problems rightly in {show(long['length'], 1)} tokens; "
        f"fine-tuned on the bare results, {show(short['accuracy'], 2)} in {show(short['length'], 1)} tokens."
    )
    figure, panels = new_figure(2, width=4.6)
    for axis, field, label in zip(
        panels, ("accuracy", "length"), ("right answers", "tokens of an answer"), strict=True
    ):
        for index, kind in enumerate(KINDS):
            spreads = [numbers[arm][kind][field] for arm in ARMS]
            places = [at + 0.38 * (index - 0.5) for at in range(len(ARMS))]
            errors = [each["standard_deviation"] or 0.0 for each in spreads]
            axis.bar(places, [each["mean"] for each in spreads], 0.36, yerr=errors, label=f"problems with {kind}")
        axis.set_xticks(range(len(ARMS)), [_TITLES[arm] for arm in ARMS], fontsize=7)
        axis.set(ylabel=label)
    legend_below(figure, panels[0])
    print(describe(numbers))
    write_results(options, {options.name: figure}, verdict, {"arms": numbers, "long_less_short": [gain, longer]})


def _scores(options: Options, seed: int) -> dict[str, dict[str, Score]]:
    """Returns the scores of each arm with a seed; trains what is not there."""
    teacher, base = train_policy(options, seed), train_base(options, seed)
    folder = options.runs / f"distillation-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    long = draw_right(teacher, folder / "long.jsonl", problems=PROBLEMS, samples=2, seed=seed)
    results = [kept | {"completion": f"\\boxed{{{kept['answer']}}}"} for kept in read_kept(long)]
    short = write_samples(folder / "short.jsonl", results)
    arms = {"base": base, "teacher": teacher}
    for name, data in (("short", short), ("long", long)):
        arms[name] = fine_tune(base, data, folder / name, steps=options.steps or 400, seed=seed)
    return {name: held_out(run) for name, run in arms.items()}


if __name__ == "__main__":
    main()
