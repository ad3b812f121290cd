"""Compares Muon with AdamW at several learning rates, and shows what QK-clip does to the attention logits.

    python experiments/muon_vs_adamw.py [--scale tiny|small|1b] [--seeds 0 1]

Claims: Muon takes AdamW's learning rate and needs about half of its training computation for the same loss (Liu et al.
2025, "Muon is scalable for LLM training"); QK-clip keeps the largest attention logit near its threshold without harm to
the loss (Kimi Team 2025, section 2.1). Both optimizers are run with the scale's learning rate, a third of it and three
times it, because a comparison at one learning rate alone would favour the optimizer that it was found for.
"""

from __future__ import annotations

from typing import Any

from ablation import (
    ArmResult,
    RunConfig,
    legend_below,
    new_figure,
    parse_options,
    run_arms,
    run_of,
    show,
    smoothed,
    spread,
    write_results,
)

from dsv3_jax.runs.folder import RunFolder
from dsv3_jax.runs.metrics import read_metrics

FACTORS = {"a third": 1 / 3, "once": 1.0, "three times": 3.0}  # of the scale's learning rate
CLIPS = {"tiny": 4.0, "small": 20.0, "1b": 100.0}  # thresholds that the scale's logits exceed without clipping
NEVER = 1e6  # a threshold at which logits are measured and not clipped


def arms_of(scale: str) -> dict[str, tuple[float, dict[str, Any]]]:
    """Returns for each arm the factor of its learning rate and the fields of the training configuration it changes."""
    arms: dict[str, tuple[float, dict[str, Any]]] = {}
    for optimizer in ("adamw", "muon"):
        for name, factor in FACTORS.items():
            arms[f"{optimizer}, {name}"] = (factor, {"optimizer": optimizer, "qk_clip": NEVER})
    arms["muon, three times, QK-clip"] = (FACTORS["three times"], {"optimizer": "muon", "qk_clip": CLIPS[scale]})
    return arms


def main(argv: list[str] | None = None) -> None:
    options = parse_options("muon_vs_adamw", __doc__, argv)
    fields = arms_of(options.scale)

    def arm(name: str):
        factor, training = fields[name]

        def of_seed(seed: int) -> RunConfig:
            rate = run_of(options, seed, steps=1).training.schedule.learning_rate
            return run_of(options, seed, steps=300, schedule={"learning_rate": factor * rate}, **training)

        return of_seed

    results = run_arms(options, {name: arm(name) for name in fields})
    numbers: dict[str, Any] = {}
    figure, (losses, logits) = new_figure(2)
    for name, runs in results.items():
        largest = [largest_logits(run) for run in runs]
        numbers[name] = {
            "validation_loss": spread([run.validation_loss for run in runs]),
            "largest_logit_at_end": spread([values[-1] for values in largest]),
            "largest_logit": spread([max(values) for values in largest]),
        }
        style = "--" if name.startswith("adamw") else "-"
        losses.plot(runs[0].steps, smoothed(runs[0].loss), style, label=name)
        logits.plot(runs[0].steps, largest[0], style, label=name)
        loss, logit = numbers[name]["validation_loss"], numbers[name]["largest_logit"]
        print(f"{name:28} validation {show(loss)}  largest logit {show(logit, 1)}")
    losses.set(xlabel="step", ylabel="training loss, nats per token", title="Loss of the main head, smoothed")
    losses.set_ylim(top=smoothed(results["adamw, once"][0].loss)[len(results["adamw, once"][0].loss) // 20])
    logits.set(xlabel="step", ylabel="largest attention logit", title="Largest logit of all heads", yscale="log")
    legend_below(figure, losses)

    best = {
        optimizer: min(
            (name for name in fields if name.startswith(optimizer) and not name.endswith("clip")),
            key=lambda name: numbers[name]["validation_loss"]["mean"],
        )
        for optimizer in ("adamw", "muon")
    }
    shares = [
        steps_needed(muon, adamw) for muon, adamw in zip(results[best["muon"]], results[best["adamw"]], strict=True)
    ]
    verdict = _verdict(numbers, best, shares, CLIPS[options.scale])
    write_results(
        options, {"muon_vs_adamw": figure}, verdict, {"arms": numbers, "best": best, "share_of_steps": spread(shares)}
    )


def largest_logits(run: ArmResult) -> list[float]:
    """Returns the largest attention logit of every step."""
    return [record["largest_logit"] for record in read_metrics(RunFolder(run.folder).metrics) if "loss" in record]


def steps_needed(run: ArmResult, other: ArmResult) -> float:
    """Returns the share of its steps after which `run` has the final smoothed training loss of `other`; at most 1."""
    wanted = smoothed(other.loss)[-1]
    reached = (step for step, loss in zip(run.steps, smoothed(run.loss), strict=True) if loss <= wanted)
    return next(reached, run.steps[-1]) / run.steps[-1]


def _verdict(numbers: dict[str, Any], best: dict[str, str], shares: list[float], clip: float) -> str:
    """Returns the result in words."""
    muon, adamw = (numbers[best[name]]["validation_loss"] for name in ("muon", "adamw"))
    noise = max(muon["standard_deviation"] or 0.0, adamw["standard_deviation"] or 0.0)
    better = adamw["mean"] - muon["mean"]
    holds = "holds" if better > 2 * noise and max(shares) < 0.75 else "cannot be seen"
    same = "the same" if best["muon"].split(", ")[1] == best["adamw"].split(", ")[1] else "not the same"
    free, clipped = numbers["muon, three times"], numbers["muon, three times, QK-clip"]
    return (
        f"The best validation loss is {show(muon)} with Muon and {show(adamw)} with AdamW (best learning rates: "
        f"{best['muon'].split(', ')[1]} and {best['adamw'].split(', ')[1]}, {same}); Muon has AdamW's final training "
        f"loss after {100 * max(shares):.0f}% of the steps, so that the claim of about half {holds}. QK-clip at "
        f"{clip:g} brings the largest logit at the end from {free['largest_logit_at_end']['mean']:.1f} to "
        f"{clipped['largest_logit_at_end']['mean']:.1f}, and the validation loss from "
        f"{free['validation_loss']['mean']:.4f} to {clipped['validation_loss']['mean']:.4f}."
    )


if __name__ == "__main__":
    main()
