"""Compares FP8 training with bfloat16 training (report section 3.3, appendix B.1 and B.2, figure 10).

    python experiments/fp8_vs_bf16.py [--scale tiny|small|1b] [--seeds 0 1 2] [--arms "no promotion"]

Claims: the relative difference of the loss stays under 0.25%, and quantising gradients in 128x128 blocks makes
training worse (the report saw a 16B model diverge after 300B tokens). Further arms each turn off one part of the
recipe: tiles (one scale per tensor instead), promotion, or e4m3 gradients. All arms of a seed have the same initial
weights and batches.

Any two runs that round differently drift apart. Two arms without FP8 measure how far: bfloat16 with initial weights
that differ by less than bfloat16 resolves, and float32. Only what exceeds their difference is due to FP8.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from ablation import (
    Options,
    RunConfig,
    legend_below,
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

from dsv3_jax import DeepSeekV3
from dsv3_jax.runs.checkpoints import make_model

CLAIM = 0.0025
NUDGED, BLOCKS = "bf16, weights nudged", "block-wise gradients"
COMPARED = ("bf16", NUDGED, "fp8")  # the arms that the first claim is about
STYLES = {"bf16": "black", NUDGED: "0.5", "float32": "0.7"}  # the arms without FP8
NUDGE = 2.0**-9  # relative change of a weight: half the distance between neighbouring bfloat16 numbers
ARMS = {
    "bf16": "bfloat16",
    NUDGED: "bfloat16",
    "float32": "float32",
    "fp8": "fp8",
    BLOCKS: "fp8,block_wise_gradients=true",
    "one scale per tensor": "fp8,tile=0",
    "no promotion": "fp8,promotion=false",
    "e5m2 gradients": "fp8,input_gradient=e5m2,weight_gradient=e5m2",
}


def nudged(config: RunConfig) -> DeepSeekV3:
    """Returns the run's initial model with every weight multiplied by 1 + e, where e is uniform in [-NUDGE, NUDGE)."""
    model = make_model(config)
    params = nnx.state(model, nnx.Param)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(config.training.seed + 1), len(leaves))
    moved = [
        leaf * (1 + jax.random.uniform(key, leaf.shape, leaf.dtype, -NUDGE, NUDGE))
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    nnx.update(model, jax.tree.unflatten(tree, moved))
    return model


def main(argv: list[str] | None = None) -> None:
    options = parse_options("fp8_vs_bf16", __doc__, argv, arms=tuple(ARMS), compared=COMPARED)

    def arm(precision: str):
        def of_seed(seed: int) -> RunConfig:
            return dataclasses.replace(run_of(options, seed, steps=150), precision=precision)

        return of_seed

    results = run_arms(options, {name: arm(ARMS[name]) for name in options.arms}, {NUDGED: nudged})
    base = results["bf16"]
    numbers = {}
    figure, (curves, differences) = new_figure(2)
    for name, runs in results.items():
        relative = [
            [(a - b) / b for a, b in zip(smoothed(run.loss), smoothed(other.loss), strict=True)]
            for run, other in zip(runs, base, strict=True)
        ]
        signed = [values[len(values) // 2 :] for values in relative]
        late = [[abs(value) for value in values] for values in signed]
        validation = [run.validation_loss for run in runs]
        numbers[name] = {
            "validation_loss": spread(validation),
            "validation_difference": paired(validation, [run.validation_loss for run in base]),
            "relative_loss_difference": spread([sum(values) / len(values) for values in late]),
            "signed_relative_loss_difference": spread([sum(values) / len(values) for values in signed]),
            "largest_relative_loss_difference": spread([max(values) for values in late]),
        }
        style = {"color": STYLES[name], "ls": "--"} if name in STYLES else {}
        curves.plot(runs[0].steps, smoothed(runs[0].loss), label=name, **style)
        differences.plot(runs[0].steps, [100 * value for value in relative[0]], label=name, **style)
    curves.set(xlabel="step", ylabel="loss, nats per token", title="Training loss (smoothed, 0.9)")
    differences.axhspan(-100 * CLAIM, 100 * CLAIM, color="0.9", label="±0.25%")
    differences.set(xlabel="step", ylabel="%", title=f"Relative difference to bf16, seed {options.seeds[0]}")
    legend_below(figure, differences)

    for name, values in numbers.items():
        print(f"{name:22} validation {show(values['validation_loss'])}")
    above = _above_noise(numbers)
    measured = {
        "arms": numbers,
        "precision_of_arms": {name: ARMS[name] for name in options.arms},
        "fp8_less_noise": above,
    }
    write_results(options, {"fp8_vs_bf16": figure}, _verdict(options, numbers, above), measured)


def _noise(numbers: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns by how much the losses of the arms without FP8 differ from bf16's, over the second half of the run."""
    return {name: numbers[name]["relative_loss_difference"] for name in STYLES if name in numbers and name != "bf16"}


def _above_noise(numbers: dict[str, Any]) -> dict[str, Any]:
    """Returns the difference of FP8 less the largest difference without FP8, seed by seed."""
    floor = [max(of_seed) for of_seed in zip(*(found["values"] for found in _noise(numbers).values()), strict=True)]
    return paired(numbers["fp8"]["relative_loss_difference"]["values"], floor)


def _verdict(options: Options, numbers: dict[str, Any], above: dict[str, Any]) -> str:
    """Returns the result in words; `above` is the difference of FP8 less that of two runs without FP8."""
    fp8, noise = numbers["fp8"], _noise(numbers)
    difference = fp8["relative_loss_difference"]["mean"]
    deviation = above["standard_deviation"] or 0.0
    side = "higher" if fp8["signed_relative_loss_difference"]["mean"] > 0 else "lower"
    verdict = (
        f"With FP8 the smoothed loss differs by {100 * difference:.2f}% from that with bf16 over the second "
        f"half of the run (at most {100 * fp8['largest_relative_loss_difference']['mean']:.2f}%) and is the {side} "
        f"one: the claim of under 0.25% {'holds' if difference < CLAIM else 'does not hold'} at scale "
        f"{options.scale}. "
        f"Two bf16 runs whose weights differ by less than bf16 resolves are {100 * noise[NUDGED]['mean']:.2f}% apart"
        + (f", bf16 and float32 {100 * noise['float32']['mean']:.2f}%" if "float32" in noise else "")
        + f". FP8's difference {'exceeds' if above['mean'] > 2 * deviation > 0 else 'does not exceed'} "
        f"{'the larger of these' if len(noise) > 1 else 'this'}: the one less the other is {100 * above['mean']:+.2f}% "
        f"(deviation over the seeds {100 * deviation:.2f}%)."
    )
    if BLOCKS not in numbers:
        return verdict
    change = paired(numbers[BLOCKS]["validation_loss"]["values"], fp8["validation_loss"]["values"])
    worse, deviation = change["mean"], change["standard_deviation"] or 0.0
    return (
        f"{verdict} Block-wise gradients change the validation loss by {worse:+.4f} compared with FP8 in tiles "
        f"(deviation over the seeds {deviation:.4f}), "
        + ("which is worse." if worse > 2 * deviation > 0 else "which cannot be told from noise at this size.")
    )


if __name__ == "__main__":
    main()
