"""Trains with and without the multi-token prediction (MTP) module and compares the main model (sections 2.2 and 4.5.1).

    python experiments/mtp_ablation.py [--scale tiny|small|1b] [--seeds 0 1 2]

Claim (table 4): when the module is dropped at inference, the main model is as good as one trained without it, or
better. The main measure is the validation loss of the main head. Models of this size cannot do the report's
downstream tasks, so two probes stand for them: how often the answer to an exercise is right (exact match of greedy
bytes), and the loss on the second occurrence of a random string (induction).
"""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import jax.numpy as jnp
import numpy as np
from ablation import (
    ArmResult,
    RunConfig,
    new_figure,
    paired,
    parse_options,
    run_arms,
    run_of,
    show,
    smoothed,
    spread,
    write_results,
)
from flax import nnx

import dsv3_jax as dsv3

PROBES = 256  # exercises, and random strings
REPEATED = 24  # length of the string that occurs twice


def main(argv: list[str] | None = None) -> None:
    options = parse_options("mtp_ablation", __doc__, argv, seeds=3)

    def arm(depth: int):
        def of_seed(seed: int) -> RunConfig:
            run = run_of(options, seed, steps=250)
            return dataclasses.replace(run, model=run.model.replace(num_nextn_predict_layers=depth))

        return of_seed

    results = run_arms(options, {"without": arm(0), "with": arm(1)})
    numbers = {name: _numbers(runs) for name, runs in results.items()}
    differences = {
        measure: paired(numbers["with"][measure]["values"], numbers["without"][measure]["values"])
        for measure in ("validation_loss", "answers_right", "repetition_loss")
    }
    figure, (curves, *bars) = new_figure(3, width=4.2)
    for name, runs in results.items():
        curves.plot(runs[0].steps, smoothed(runs[0].loss), label=f"{name} MTP")
    curves.set(xlabel="step", ylabel="loss of the main head", title="Main head, training (smoothed)")
    curves.legend()
    losses = {"validation": differences["validation_loss"], "repetition": differences["repetition_loss"]}
    _draw_differences(bars[0], losses, 1.0, "loss, nats per byte")
    _draw_differences(bars[1], {"answers": differences["answers_right"]}, 100.0, "right answers, percentage points")

    loss, answers = differences["validation_loss"], differences["answers_right"]
    noise = loss["standard_deviation"] or 0.0
    seen = abs(loss["mean"]) > 2 * noise > 0
    acceptance = numbers["with"]["acceptance"]
    verdict = (
        f"With the MTP module the main head's validation loss changes by {show(loss)} "
        f"({'worse' if loss['mean'] > 0 else 'better'}{'' if seen else ', within the noise of the seeds'}) and the "
        f"share of right answers by {100 * answers['mean']:+.1f} percentage points. "
        f"{100 * acceptance['mean']:.0f}% of the drafts are accepted (report: 85 to 90% at 671B)."
    )
    for name, values in numbers.items():
        print(f"{name:8}", {measure: show(value) for measure, value in values.items()})
    write_results(options, {"mtp_ablation": figure}, verdict, {"arms": numbers, "with_less_without": differences})


def _draw_differences(axis: Any, differences: dict[str, dict], unit: float, label: str) -> None:
    """Draws a bar with the mean and deviation of each difference, times `unit`, and a dot for every seed."""
    for column, difference in enumerate(differences.values()):
        deviation = difference["standard_deviation"] or 0.0
        axis.bar(column, unit * difference["mean"], yerr=unit * deviation, width=0.5, color="0.8", ecolor="0.4")
        values = [unit * value for value in difference["values"]]
        axis.plot([column] * len(values), values, "o", color="tab:orange", ms=4)
    axis.axhline(0, color="0.3", lw=0.8)
    axis.set_xticks(range(len(differences)), list(differences))
    axis.set(ylabel=label, xlim=(-0.6, len(differences) - 0.4), title="with MTP - without, by seed")
    if not any(value for difference in differences.values() for value in difference["values"]):
        axis.set_ylim(-1, 1)


def _numbers(runs: list[ArmResult]) -> dict[str, dict[str, Any]]:
    """Returns the measures of one arm, each with its spread over the seeds."""
    probes = [_probe(run) for run in runs]
    numbers = {
        "validation_loss": spread([run.validation_loss for run in runs]),
        "answers_right": spread([answers for answers, _ in probes]),
        "repetition_loss": spread([loss for _, loss in probes]),
    }
    if runs[0].validation["mtp_acceptance"]:
        numbers["acceptance"] = spread([run.validation["mtp_acceptance"][0] for run in runs])
    return numbers


def _probe(run: ArmResult) -> tuple[float, float]:
    """Returns the share of exercises with a fully right answer, and the loss on repeated strings in nats per byte."""
    model, tokenizer, _ = dsv3.load_checkpoint(run.folder)
    draw = random.Random(12345)
    exercises = [(f"What is {a} + {b}? ", f"{a + b}\n") for a, b in _pairs(draw)]
    right = []
    rows = [tokenizer.encode(question + answer) for question, answer in exercises]
    logits, targets = _logits(model, rows)
    for row, (_, answer) in enumerate(exercises):
        end, start = len(rows[row]) - 1, len(rows[row]) - 1 - len(answer)
        right.append(bool(np.all(np.argmax(logits[row, start:end], -1) == targets[row, start:end])))

    letters = "abcdefghijklmnopqrstuvwxyz"
    texts = ["".join(draw.choices(letters, k=REPEATED)) for _ in range(PROBES)]
    logits, targets = _logits(model, [tokenizer.encode(f"{text}\n{text}") for text in texts])
    again = slice(REPEATED + 1, 2 * REPEATED)  # the first repeated letter cannot be predicted
    logits, targets = logits[:, again], targets[:, again]
    at_target = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    losses = np.log(np.sum(np.exp(logits - logits.max(-1, keepdims=True)), -1)) + logits.max(-1) - at_target
    return float(np.mean(right)), float(np.mean(losses))


def _pairs(draw: random.Random) -> list[tuple[int, int]]:
    """Returns the operands of the exercises."""
    return [(draw.randint(2, 99), draw.randint(2, 99)) for _ in range(PROBES)]


def _logits(model: dsv3.DeepSeekV3, rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns logits [rows, T, V] at every position and the next token [rows, T]; short rows are padded with zeros."""
    width = max(map(len, rows))
    tokens = np.zeros((len(rows), width), np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    logits = nnx.jit(lambda model, tokens: model(tokens).logits)(model, jnp.asarray(tokens[:, :-1]))
    return np.asarray(logits, np.float64), tokens[:, 1:]


if __name__ == "__main__":
    main()
