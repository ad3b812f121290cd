"""How many drafts of the MTP module are accepted after post-training, by topic, depth and position? (section 5.4.3)

    python experiments/mtp_acceptance.py --seeds 0 1

The report finds that 85 to 90% of the second tokens are accepted "across various generation topics". Here a base model
with one MTP module reads four topics: code, prose and mathematics of the corpus of the other experiments, and
arithmetic problems with quick or worked answers, as in r1_zero_small.py. It is fine-tuned (`dsv3 sft`, the MTP module
too) on continuations of all topics, whose arithmetic is worked out, and then trained by reward on
arithmetic (`dsv3 grpo`, which leaves the MTP module as it is). After each stage the engine continues held-out texts
of each topic with two drafts a step, and counts what is accepted: with the most likely tokens, and with tokens drawn
at temperature 1.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ablation import Options, byte_data, new_figure, parse_options, run_arm, run_of, show, spread, write_results
from corpora import DOMAINS
from r1_zero_small import NEW_TOKENS, SIZE, WORKED, quick_answer, worked_answer
from reasoning import fine_tune, held_out, reinforce, write_samples

from dsv3_jax import load_checkpoint
from dsv3_jax.cli.compilation_cache import keep_compiled_programs
from dsv3_jax.evaluation.acceptance import DraftCounts, measure_acceptance
from dsv3_jax.inference import GREEDY, Engine, EngineConfig, Request, Sampler
from dsv3_jax.post_training.tasks import distinct, generate_problems
from dsv3_jax.runs.evaluation import load_run_with_data

STAGES = ("base", "fine-tuned", "reinforced")
TOPICS = (*DOMAINS, "arithmetic")
SAMPLERS = {"most likely": GREEDY, "drawn": Sampler()}
ANSWERS = 20_000  # arithmetic texts of the base model, about as many bytes as each other topic has
PROMPT = 48  # tokens of a text that is continued
TEXTS = 64  # of each topic that are continued
DEPTHS = 2


def main(argv: list[str] | None = None) -> None:
    options = parse_options("mtp_acceptance", __doc__, argv, seeds=1)
    keep_compiled_programs()
    by_seed = [_stages(options, seed) for seed in options.seeds]
    measured = {
        stage: {
            way: {topic: _numbers([counts[stage][way][topic] for counts, _ in by_seed]) for topic in TOPICS}
            for way in SAMPLERS
        }
        for stage in STAGES
    }
    accuracy = {stage: spread([right[stage] for _, right in by_seed]) for stage in STAGES}
    drawn = {topic: measured["fine-tuned"]["drawn"][topic]["by_depth"][0] for topic in TOPICS}
    low, high = (choose(share["mean"] for share in drawn.values()) for choose in (min, max))
    before, after = (measured[stage]["drawn"]["arithmetic"]["by_depth"][0] for stage in STAGES[1:])
    verdict = (
        f"{'Holds' if low >= 0.85 else 'Does not hold at this size' if high < 0.85 else 'Holds for some topics'}: "
        "after fine-tuning, of the drafts of the second token of texts drawn at temperature 1, "
        + ", ".join(f"{show(share, 2)} ({topic})" for topic, share in drawn.items())
        + " are accepted (report: 0.85 to 0.90). Reinforcement, which leaves the MTP module as it is, changes this for "
        + f"arithmetic from {show(before, 2)} to {show(after, 2)}."
    )
    figure, (topics, positions) = new_figure(2, width=5.0)
    for number, stage in enumerate(STAGES):
        shares = [measured[stage]["drawn"][topic]["by_depth"][0] for topic in TOPICS]
        places = [at + 0.27 * (number - 1) for at in range(len(TOPICS))]
        errors = [share["standard_deviation"] or 0.0 for share in shares]
        topics.bar(places, [share["mean"] for share in shares], 0.25, yerr=errors, label=stage)
    topics.axhspan(0.85, 0.9, color="0.85", label="report")
    topics.set_xticks(range(len(TOPICS)), TOPICS)
    topics.set(ylabel="accepted drafts of the second token", ylim=(0, 1))
    topics.legend(fontsize=7, loc="lower center", ncols=4)
    for topic, depth in itertools.product(TOPICS, range(DEPTHS)):
        found = measured["fine-tuned"]["drawn"][topic]
        line = [np.nan if group[depth] is None else group[depth] for group in found["by_position"]]
        label = topic if depth == 0 else None
        style = {"color": f"C{TOPICS.index(topic)}", "linestyle": "-" if depth == 0 else "--"}
        positions.plot(range(len(line)), line, marker="o", markersize=3, label=label, **style)
    firsts = max((measured["fine-tuned"]["drawn"][topic]["positions"] for topic in TOPICS), key=len)
    positions.set_xticks(range(len(firsts)), firsts)
    positions.set(xlabel="position in the answer, from (dashed: the second draft)", ylabel="accepted", ylim=(0, 1))
    positions.legend(fontsize=7)
    print(_describe(measured))
    numbers = {"acceptance": measured, "right_answers_to_arithmetic": accuracy}
    write_results(options, {options.name: figure}, verdict, numbers)


def _stages(options: Options, seed: int) -> tuple[dict[str, dict[str, dict[str, DraftCounts]]], dict[str, float]]:
    """Returns the counts of each stage, sampler and topic with a seed, and each stage's accuracy in arithmetic."""
    base, folder = options.runs / f"base-{seed}", options.runs / f"stages-{seed}"
    run_arm(_base(options, seed), base)
    folder.mkdir(parents=True, exist_ok=True)
    data = write_samples(folder / "continuations.jsonl", _samples(base))
    tuned = fine_tune(base, data, folder / "fine-tuned", steps=options.steps or 300, seed=seed)
    runs = dict(zip(STAGES, (base, tuned, folder / "reinforced"), strict=True))
    reinforce(tuned, runs["reinforced"], steps=options.steps or 20, seed=seed)
    prompts = _prompts(base)
    return {stage: _measure(run, prompts) for stage, run in runs.items()}, {
        stage: held_out(run)["all"].accuracy for stage, run in runs.items()
    }


def _base(options: Options, seed: int) -> Any:
    """Returns the run of the base model: the scale's model with one MTP module on all topics."""
    run = run_of(options, seed, steps=2000)
    data = byte_data(_write_topics(options), length=128, seed=seed)
    data = dataclasses.replace(data, validation_fraction=0.1, validation_sequences=128)
    return dataclasses.replace(run, data=data, model=run.model.replace(num_nextn_predict_layers=1))


def _write_topics(options: Options) -> Path:
    """Writes the texts of all topics as JSON lines, unless they are there; returns the file."""
    path = options.runs / "topics.jsonl"
    if path.exists():
        return path
    lines = [json.dumps({"text": text, "domain": "arithmetic"}) + "\n" for text in _arithmetic()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(options.corpus.read_text(encoding="utf-8") + "".join(lines), encoding="utf-8")
    return path


def _arithmetic() -> Iterator[str]:
    """Yields problems with quick and worked answers."""
    draw = random.Random(0)
    for problem in itertools.islice(generate_problems("arithmetic", "train", 12345, SIZE), ANSWERS):
        yield problem.prompt + (worked_answer(problem) if draw.random() < WORKED else quick_answer(problem))


def _samples(base: Path) -> Iterator[dict[str, Any]]:
    """Yields the samples of the fine-tuning: pieces of training texts, which do not end, and worked arithmetic."""
    _, data = load_run_with_data(base)
    for document in data.documents("train"):
        if document.domain != "arithmetic":
            for at in range(0, len(document.text) - 2 * PROMPT, 2 * PROMPT):
                prompt, completion = document.text[at : at + PROMPT], document.text[at + PROMPT : at + 2 * PROMPT]
                yield {"prompt": prompt, "completion": completion, "cut": True}
    for problem in itertools.islice(generate_problems("arithmetic", "train", 0, SIZE), 4000):
        yield {"prompt": problem.prompt, "completion": worked_answer(problem)}


def _prompts(base: Path) -> dict[str, list[tuple[int, ...]]]:
    """Returns the beginnings of held-out texts of each topic, as tokens."""
    _, data = load_run_with_data(base)
    problems = distinct(generate_problems("arithmetic", "held-out", 0, SIZE), TEXTS)
    prompts = {"arithmetic": [tuple(data.tokenizer.prompt_ids(problem.prompt)) for problem in problems]}
    for domain in DOMAINS:
        texts = [document.text for document in data.documents("validation") if document.domain == domain]
        ids = data.tokenizer.encode("\n".join(texts))
        starts = range(0, len(ids) - PROMPT, max((len(ids) - PROMPT) // TEXTS, 1))
        prompts[domain] = [tuple(ids[start : start + PROMPT]) for start in starts[:TEXTS]]
    return prompts


def _measure(run: Path, prompts: Mapping[str, Sequence[tuple[int, ...]]]) -> dict[str, dict[str, DraftCounts]]:
    """Returns the counts of a finished run by sampler and topic; they are kept in its folder."""
    kept = run / "acceptance.json"
    if kept.exists():
        return _read_counts(json.loads(kept.read_text()))
    model, tokenizer, _ = load_checkpoint(run)
    engine = Engine(model, EngineConfig(max_sequences=TEXTS, context=128, chunk_rows=8, drafts=DEPTHS, top_logprobs=1))
    ends = tuple(tokenizer.end_ids)
    counts = {
        way: {
            topic: measure_acceptance(
                engine,
                [
                    Request(prompt=prompt, max_new_tokens=NEW_TOKENS, sampler=sampler, seed=number, stop_tokens=ends)
                    for number, prompt in enumerate(prompts[topic])
                ],
            )
            for topic in TOPICS
        }
        for way, sampler in SAMPLERS.items()
    }
    values = {way: {topic: each.to_dict() for topic, each in of_way.items()} for way, of_way in counts.items()}
    kept.write_text(json.dumps(values) + "\n")
    return counts


def _read_counts(values: Mapping[str, Any]) -> dict[str, dict[str, DraftCounts]]:
    return {
        way: {
            topic: DraftCounts(np.asarray(each["offered"]), np.asarray(each["accepted"]))
            for topic, each in of_way.items()
        }
        for way, of_way in values.items()
    }


def _numbers(counts: Sequence[DraftCounts]) -> dict[str, Any]:
    """Returns what the counts of all seeds say: shares by depth with their spread, and by position over all seeds."""
    length = max(len(each.offered) for each in counts)
    offered, accepted = (
        sum(np.pad(getattr(each, field), ((0, length - len(each.offered)), (0, 0))) for each in counts)
        for field in ("offered", "accepted")
    )
    positions, shares = DraftCounts(offered, accepted).groups_of_positions()
    return {
        "by_depth": [spread([float(each.by_depth[depth]) for each in counts]) for depth in range(DEPTHS)],
        "tokens_per_step": spread([each.tokens_per_step for each in counts]),
        "positions": list(positions),
        "by_position": [[None if np.isnan(share) else float(share) for share in row] for row in shares],
        "drafts": [int(number) for number in offered.sum(axis=0)],
    }


def _describe(measured: Mapping[str, Any]) -> str:
    """Returns the shares by stage, sampler and topic as a table."""
    lines = [f"{'':26}" + "".join(f"{topic:>42}" for topic in TOPICS)]
    for stage, way in itertools.product(STAGES, SAMPLERS):
        cells = []
        for topic in TOPICS:
            found = measured[stage][way][topic]
            parts = [*(show(each, 2) for each in found["by_depth"]), show(found["tokens_per_step"], 2)]
            cells.append(f"{', '.join(parts):>42}")
        lines.append(f"{stage + ', ' + way:26}" + "".join(cells))
    return "\n".join(["drafts accepted at depth 1 and 2, and tokens of a step", *lines])


if __name__ == "__main__":
    main()
