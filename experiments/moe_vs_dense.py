"""Compares a mixture of experts with dense models: one of equal compute per token and one of equal memory.

    python experiments/moe_vs_dense.py [--scale tiny|small|1b] [--seeds 0 1 2]

Claim (section 2.1.2): a mixture of experts gives the quality of a larger dense model at the cost of a smaller one. All
arms read the same real text, the default corpus, in the same order, with the same attention, depth and width of the
hidden state; only the feed-forward networks differ. "dense, equal compute" does as many operations per token as the
mixture, "dense, equal memory" has as many parameters. No arm has a multi-token prediction module, which would be a
mixture in all of them. The learning rate is the one chosen for the mixture.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from ablation import (
    BYTES,
    ArmResult,
    Options,
    RunConfig,
    new_figure,
    paired,
    parse_options,
    run_arms,
    run_of,
    show,
    smoothed,
    spread,
    tiny_model,
    write_results,
)

from dsv3_jax import ModelConfig, default_run
from dsv3_jax.counts import count_flops
from dsv3_jax.data import DataConfig

MOE, COMPUTE, MEMORY = "MoE", "dense, equal compute", "dense, equal memory"
_PRESETS = {"small": "nano", "1b": "1b"}


def mixture_and_data(scale: str) -> tuple[ModelConfig, DataConfig]:
    """Returns the mixture of experts of a scale, without an MTP module, and its text."""
    if scale == "tiny":
        data = DataConfig(tokenizer="byte", vocab_size=BYTES, sequence_length=128)
        model = tiny_model().replace(num_hidden_layers=4, n_routed_experts=32, num_experts_per_tok=4)
    else:
        run = default_run(_PRESETS[scale])
        model, data = run.model, run.data
    return model.replace(num_nextn_predict_layers=0), dataclasses.replace(data, validation_sequences=128)


def dense_like(model: ModelConfig, count: Callable[[ModelConfig], float]) -> ModelConfig:
    """Returns the dense model with the width of feed-forward networks at which its `count` is nearest to the model's.

    Args:
      count: returns a number that grows linearly with that width, such as parameters or operations.
    """
    dense = model.replace(first_k_dense_replace=model.num_hidden_layers, intermediate_size=1)
    per_unit = count(dense.replace(intermediate_size=2)) - count(dense)
    return dense.replace(intermediate_size=1 + round((count(model) - count(dense)) / per_unit))


def models_of(scale: str) -> dict[str, ModelConfig]:
    """Returns the model of each arm."""
    model, data = mixture_and_data(scale)

    def operations(model: ModelConfig) -> float:
        return count_flops(model, data.sequence_length).forward

    return {MOE: model, COMPUTE: dense_like(model, operations), MEMORY: dense_like(model, ModelConfig.num_parameters)}


def main(argv: list[str] | None = None) -> None:
    options = parse_options("moe_vs_dense", __doc__, argv, seeds=3)
    models, (_, data) = models_of(options.scale), mixture_and_data(options.scale)

    def arm(name: str):
        def of_seed(seed: int) -> RunConfig:
            run = run_of(options, seed, steps=300, data=dataclasses.replace(data, seed=seed))
            return dataclasses.replace(run, model=models[name])

        return of_seed

    results = run_arms(options, {name: arm(name) for name in models})
    base = _bits(results[MOE])
    numbers = {}
    for name, model in models.items():
        bits, flops = _bits(results[name]), count_flops(model, data.sequence_length)
        numbers[name] = {
            "parameters": model.num_parameters(),
            "operations_per_token": flops.forward,
            "width_of_feed_forward": model.intermediate_size,
            "bits_per_byte": spread(bits),
            "more_than_mixture": paired(bits, base),
        }
        print(f"{name:22} {show(numbers[name]['bits_per_byte'])} bits per byte")
    arms = {name: arm(name)(options.seeds[0]) for name in models}
    tokens = arms[MOE].training.batch_size * data.sequence_length
    verdict = _verdict(options, numbers, len(results[MOE][0].steps) * tokens)
    write_results(options, {"moe_vs_dense": _draw(results, numbers, tokens)}, verdict, {"arms": numbers})


def _bits(runs: list[ArmResult]) -> list[float]:
    return [run.validation["main"]["bits_per_byte"] for run in runs]


def _draw(results: dict[str, list[ArmResult]], numbers: dict[str, Any], tokens: int) -> Any:
    """Returns a figure of the training loss by tokens and by operations, and of the validation by arm."""
    figure, (by_tokens, by_operations, last) = new_figure(3, width=4.4)
    for column, (name, runs) in enumerate(results.items()):
        operations = 3 * numbers[name]["operations_per_token"]
        colour = f"C{column}"
        for number, run in enumerate(runs):
            label = name if number == 0 else None
            read = [step * tokens for step in run.steps]
            by_tokens.plot([n / 1e6 for n in read], smoothed(run.loss), color=colour, lw=1, alpha=0.7, label=label)
            by_operations.plot([n * operations for n in read], smoothed(run.loss), color=colour, lw=1, alpha=0.7)
        last.plot([column] * len(runs), _bits(runs), "o", color=colour)
    by_tokens.set(xlabel="million tokens read", ylabel="loss, nats per token", title="Training, at equal text")
    by_operations.set(xlabel="operations", xscale="log", title="Training, at equal compute")
    last.set_xticks(range(len(results)), [name.replace(", ", ",\n") for name in results])
    last.set(ylabel="bits per byte", title="Validation at the end, by seed", xlim=(-0.5, len(results) - 0.5))
    by_tokens.legend()
    return figure


def _verdict(options: Options, numbers: dict[str, Any], tokens: int) -> str:
    """Returns the result in words."""

    def compared(name: str) -> str:
        more = numbers[name]["more_than_mixture"]
        noise = more["standard_deviation"]
        if noise is None:
            seen = "(one seed: it cannot be told from noise)"
        else:
            seen = "" if abs(more["mean"]) > 2 * noise else "(within the noise of the seeds)"
        return f"{more['mean']:+.4f}" + ("" if noise is None else f" ± {noise:.4f}") + (f" {seen}" if seen else "")

    mixture, memory = numbers[MOE], numbers[MEMORY]
    times = memory["operations_per_token"] / mixture["operations_per_token"]
    return (
        f"After {tokens / 1e6:.2f}M tokens the mixture of {mixture['parameters'] / 1e6:.2f}M parameters predicts "
        f"held-out text in {show(mixture['bits_per_byte'])} bits per byte. A dense model of equal compute per token "
        f"({numbers[COMPUTE]['parameters'] / 1e6:.2f}M parameters) needs {compared(COMPUTE)} bits more, one of equal "
        f"memory, with {times:.1f} times the operations, {compared(MEMORY)} (scale {options.scale}, "
        f"{len(options.seeds)} {'seed' if len(options.seeds) == 1 else 'seeds'})."
    )


if __name__ == "__main__":
    main()
