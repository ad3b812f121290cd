"""Extends the context in two phases with YaRN and searches for a needle in a haystack (report section 4.3, figure 8).

    python experiments/long_context.py [--scale tiny|small|1b] [--seeds 0 1]

Claim: two short training phases with YaRN (s = 40, alpha = 1, beta = 32, sqrt(t) = 0.1 ln s + 1, at the final learning
rate of pre-training) extend the context from 4K to 32K and then to 128K tokens, 8 times and 4 times its length, and the
model then finds a fact anywhere in a long text. This experiment keeps the report's ratios of lengths and batch sizes (a
step has equally many tokens in all three runs) and its YaRN settings; alpha and beta are the fields `beta_slow` and
`beta_fast`. As in the code published with the weights, the temperature multiplies all attention logits, not only those
of the decoupled key.

The texts are synthetic (`corpora.py`): facts of one character that each occur once in a document, questions about them
with answers, and filler. The needle is a fact about a key that occurs nowhere else in the haystack. The model is tested
after each phase, and for comparison after pre-training, with YaRN but untrained, and after both phases without YaRN.
There is no MTP and no auxiliary balance loss.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ablation import (
    BYTES,
    ArmResult,
    Options,
    RunConfig,
    new_figure,
    paired,
    parse_options,
    run_arm,
    run_of,
    spread,
    tiny_model,
    write_results,
)
from corpora import haystack, write_retrieval
from flax import nnx
from jaxtyping import Array, Float, Int

from dsv3_jax import DeepSeekV3, ModelConfig, RopeScaling, load_checkpoint
from dsv3_jax.cli.compilation_cache import keep_compiled_programs
from dsv3_jax.data import DataConfig
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.runs.checkpoints import make_model
from dsv3_jax.runs.folder import RunFolder
from dsv3_jax.training.schedules import TrainingSchedule

FACTOR = 40.0  # s, YaRN's scaling factor
GRIDS = ("pre-trained", "YaRN, untrained", "YaRN, phase 1", "YaRN, phase 2", "phase 2 without YaRN")
# Positions of the needle: 0 is the start of the text, 1 its end.
DEPTHS = (0.0, 0.17, 0.33, 0.5, 0.67, 0.83, 1.0)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The settings of three consecutive runs: pre-training, phase 1 and phase 2.

    Attributes:
      model: the architecture, before its context is extended.
      lengths: tokens per sequence of each run.
      batches: sequences per step of each run.
      steps: optimizer steps of each run.
      documents: number of documents in the corpus of each run.
      learning_rate: peak of pre-training; both phases use its final rate, which is the report's fraction of the peak.
      trials: haystacks per length and depth.
    """

    model: ModelConfig
    lengths: tuple[int, int, int]
    batches: tuple[int, int, int]
    steps: tuple[int, int, int]
    documents: tuple[int, int, int]
    learning_rate: float
    trials: int = 8

    @property
    def contexts(self) -> list[int]:
        """Lengths of the haystacks: powers of two, from half the length of pre-training to the length of phase 2."""
        return [
            self.lengths[0] // 2 * 2**power for power in range(int(np.log2(self.lengths[2] // self.lengths[0])) + 2)
        ]


def plan_of(options: Options) -> Plan:
    """Returns the settings of a scale: tiny, small and 1b have 1/128, 1/32 and 1/8 of the report's sequence lengths."""
    if options.scale == "tiny":
        model = tiny_model().replace(
            num_hidden_layers=2, n_routed_experts=8, qk_rope_head_dim=16, kv_lora_rank=32, initializer_range=0.05
        )
        plan = Plan(model, (32, 256, 1024), (32, 4, 1), (1000, 150, 150), (20_000, 800, 200), 3e-3)
    elif options.scale == "small":
        model = ModelConfig.preset("nano", vocab_size=BYTES)
        plan = Plan(model, (128, 1024, 4096), (64, 8, 2), (8000, 1000, 1000), (200_000, 8000, 2000), 2e-3)
    else:
        model = ModelConfig.preset("1b", vocab_size=BYTES)
        plan = Plan(model, (512, 4096, 16384), (128, 16, 4), (8000, 1000, 1000), (200_000, 16000, 4000), 6e-4)
    model = plan.model.replace(num_nextn_predict_layers=0, max_position_embeddings=plan.lengths[0], rope_scaling=None)
    steps = (options.steps,) * 3 if options.steps else plan.steps
    return dataclasses.replace(plan, model=model, steps=steps)


def extended(model: ModelConfig, original: int, yarn: bool) -> ModelConfig:
    """Returns the model for FACTOR times the context `original`, with or without YaRN; only positions differ."""
    scaling = RopeScaling(factor=FACTOR, original_max_position_embeddings=original) if yarn else None
    return model.replace(max_position_embeddings=int(FACTOR) * original, rope_scaling=scaling)


def run_of_phase(options: Options, plan: Plan, seed: int, phase: int, yarn: bool) -> RunConfig:
    """Returns the run of pre-training (phase 0), or of a phase (1, 2), at pre-training's final learning rate."""
    length = plan.lengths[phase]
    common: dict[str, Any] = {"ramp_until": 0.0, "ramp_from": 1.0, "balance_weight": 0.0}
    last = TrainingSchedule().last_rate
    schedule = TrainingSchedule(
        learning_rate=plan.learning_rate, warmup_until=0.05, constant_until=0.6, bias_update_speed=0.005, **common
    )
    if phase:
        schedule = TrainingSchedule(
            learning_rate=plan.learning_rate * last,
            warmup_until=0.0,
            constant_until=1.0,
            cosine_until=1.0,
            final_until=1.0,
            bias_update_speed=0.0,
            **common,
        )
    run = run_of(options, seed, steps=plan.steps[phase])
    corpus = write_retrieval(options.runs / f"facts-{length}.jsonl", plan.documents[phase], length)
    return dataclasses.replace(
        run,
        model=extended(plan.model, plan.lengths[0], yarn) if phase else plan.model,
        data=DataConfig(
            corpus=str(corpus),
            tokenizer="byte",
            vocab_size=BYTES,
            sequence_length=length,
            fill_in_middle_rate=0.0,
            validation_sequences=max(4, 4096 // length),
            seed=seed,
        ),
        training=dataclasses.replace(
            run.training,
            steps=plan.steps[phase],
            batch_size=plan.batches[phase],
            schedule=schedule,
            balance="none",
            checkpoint_every=500,
            log_every=500,
        ),
    )


def weights_of(folder: Path, config: RunConfig) -> DeepSeekV3:
    """Returns a model of configuration `config` with the weights that the run in `folder` has reached."""
    found, _, _ = load_checkpoint(folder)
    model = make_model(config)
    nnx.update(model, nnx.state(found))
    return model


def extend(options: Options, plan: Plan, seed: int) -> tuple[dict[str, ArmResult], dict[str, DeepSeekV3]]:
    """Runs pre-training and the phases for one seed, each from the weights of the one before.

    Returns:
      The results of each run, and the models to test, by name (GRIDS).
    """
    runs: dict[str, ArmResult] = {}

    def run(name: str, phase: int, yarn: bool, before: str | None) -> None:
        config = run_of_phase(options, plan, seed, phase, yarn)
        start = {}
        if before is not None:
            source = runs[before].folder
            start = {"initial_model": lambda devices: load_checkpoint(source, devices=devices)[0]}
        print(f"{options.name}: {name}, seed {seed}, {plan.lengths[phase]} tokens", flush=True)
        runs[name] = run_arm(config, options.runs / f"{name.replace(' ', '_').replace(',', '')}-{seed}", **start)

    run("pre-training", 0, False, None)
    for kind, yarn in (("YaRN", True), ("plain", False)):
        run(f"{kind}, phase 1", 1, yarn, "pre-training")
        run(f"{kind}, phase 2", 2, yarn, f"{kind}, phase 1")
    plain, scaled = (run_of_phase(options, plan, seed, 2, yarn) for yarn in (False, True))
    sources = {
        "pre-trained": ("pre-training", plain),
        "YaRN, untrained": ("pre-training", scaled),
        "YaRN, phase 1": ("YaRN, phase 1", scaled),
        "YaRN, phase 2": ("YaRN, phase 2", scaled),
        "phase 2 without YaRN": ("plain, phase 2", plain),
    }
    return runs, {grid: weights_of(runs[name].folder, config) for grid, (name, config) in sources.items()}


def needle_scores(model: DeepSeekV3, tokenizer: Tokenizer, plan: Plan) -> Float[np.ndarray, "depths contexts"]:
    """Returns the mean probability of the right answer by depth and haystack length; 1 means always found."""
    graph, state = nnx.split(model)
    scores = np.zeros((len(DEPTHS), len(plan.contexts)))
    for column, context in enumerate(plan.contexts):
        draw = random.Random(context)
        texts = [haystack(draw, context, depth) for depth in DEPTHS for _ in range(plan.trials)]
        width = next(length for length in plan.lengths if length >= context)  # few shapes to compile
        tokens = np.zeros((len(texts), width), np.int32)
        for row, text in zip(tokens, texts, strict=True):
            row[: len(text)] = tokenizer.encode(text)
        pass_rows = max(1, min(len(texts), 16384 // width))
        right = np.concatenate(
            [
                np.asarray(_answers(graph, state, jnp.asarray(tokens[at : at + pass_rows]), context - 1))
                for at in range(0, len(texts), pass_rows)
            ]
        )
        scores[:, column] = right.reshape(len(DEPTHS), plan.trials).mean(axis=1)
    return scores


@functools.partial(jax.jit, static_argnums=0)
def _answers(graph: Any, state: nnx.State, tokens: Int[Array, "B T"], position: Int[Array, ""]) -> Float[Array, " B"]:
    """Returns the probability that the model gives the token at `position`, from the tokens before it."""
    model: DeepSeekV3 = nnx.merge(graph, state)
    hidden = model.features(tokens).hidden
    logits = model.head(jnp.take(hidden, position - 1, axis=1))
    return jnp.take_along_axis(jax.nn.softmax(logits), jnp.take(tokens, position, axis=1)[:, None], axis=-1)[:, 0]


def main(argv: list[str] | None = None) -> None:
    options = parse_options("long_context", __doc__, argv)
    keep_compiled_programs()
    plan = plan_of(options)
    scores: dict[str, list[np.ndarray]] = {grid: [] for grid in GRIDS}
    losses: dict[str, list[float]] = {}
    for seed in options.seeds:
        runs, models = extend(options, plan, seed)
        for name, loss in _losses(runs).items():
            losses.setdefault(name, []).append(loss)
        _, tokenizer, _ = load_checkpoint(runs["pre-training"].folder)
        for grid, model in models.items():
            print(f"{options.name}: needles, {grid}, seed {seed}", flush=True)
            scores[grid].append(needle_scores(model, tokenizer, plan))
    numbers = {grid: _by_reach(of_seeds, plan) for grid, of_seeds in scores.items()}
    for grid, reaches in numbers.items():
        print(f"{grid:22}", {reach: f"{100 * value['mean']:.0f}%" for reach, value in reaches.items()})
    spreads = {name: spread(values) for name, values in losses.items()}
    means = {grid: np.mean(of_seeds, axis=0) for grid, of_seeds in scores.items()}
    write_results(
        options,
        {"long_context": draw(means, plan)},
        _verdict(numbers, spreads, plan, options.scale),
        {
            "score": numbers,
            "contexts": plan.contexts,
            "depths": DEPTHS,
            "score_by_depth_and_context": {grid: mean.round(4).tolist() for grid, mean in means.items()},
            "validation_loss": spreads,
            "runs": {name: getattr(plan, name) for name in ("lengths", "batches", "steps")},
        },
    )


def _reaches(plan: Plan) -> dict[str, Callable[[int], bool]]:
    """Returns three ranges of haystack lengths: a name, and a function that tells whether a length belongs to it."""
    first, second, third = plan.lengths
    return {
        f"up to {first}": lambda context: context <= first,
        f"{first} to {second}": lambda context: first < context <= second,
        f"{third}": lambda context: context == third,
    }


def _by_reach(of_seeds: list[np.ndarray], plan: Plan) -> dict[str, dict[str, Any]]:
    """Returns the score averaged over all depths and the lengths of each range of `_reaches`."""
    numbers = {}
    for name, holds in _reaches(plan).items():
        columns = [column for column, context in enumerate(plan.contexts) if holds(context)]
        numbers[name] = spread([float(scores[:, columns].mean()) for scores in of_seeds])
    return numbers


def _losses(runs: Mapping[str, ArmResult]) -> dict[str, float]:
    """Returns the validation losses at start and end of every run, on texts of the run's sequence length."""
    losses = {}
    for name, run in runs.items():
        start = json.loads(RunFolder(run.folder).summary.read_text())["validation_at_start"]
        # The summary of a run that was interrupted and resumed has no evaluation of its start.
        losses[f"{name}, start"] = start["main"]["loss"] if start else float("nan")
        losses[f"{name}, end"] = run.validation_loss
    return losses


def _verdict(
    numbers: Mapping[str, Mapping[str, Mapping[str, Any]]],
    losses: Mapping[str, Mapping[str, Any]],
    plan: Plan,
    scale: str,
) -> str:
    """Returns the result in words."""
    short, _, far = _reaches(plan)

    def score(grid: str, reach: str) -> str:
        return f"{100 * numbers[grid][reach]['mean']:.0f}%"

    before, after, control = (numbers[grid] for grid in ("pre-trained", "YaRN, phase 2", "phase 2 without YaRN"))
    base = before[short]["mean"]
    if base < 0.9:
        held = "the task was not learned before the extension, so the claim cannot be tested"
    elif before[far]["mean"] >= 0.9 * base:
        held = "the model finds needles before any extension, so the claim cannot be tested"
    else:
        held = f"the claim {'holds' if after[far]['mean'] >= 0.9 * base else 'does not hold'}"
    difference = paired(after[far]["values"], control[far]["values"])
    seen = abs(difference["mean"]) > max(0.01, 2 * (difference["standard_deviation"] or 0.0))
    return (
        f"The pre-trained model gives the right answer a probability of {score('pre-trained', short)} within "
        f"{plan.lengths[0]} tokens, the length of its training, and of {score('pre-trained', far)} at {far} tokens. At "
        f"{far} tokens it has {score('YaRN, untrained', far)} with YaRN but no training, "
        f"{score('YaRN, phase 1', far)} after phase 1 and {score('YaRN, phase 2', far)} after phase 2: {held} at scale "
        f"{scale}. The same two phases without YaRN reach {score('phase 2 without YaRN', far)}, which is "
        f"{'a different result' if seen else 'no visible difference'}. "
        f"The loss on texts of {plan.lengths[1]} tokens is {losses['plain, phase 1, start']['mean']:.2f} before, "
        f"{losses['YaRN, phase 1, start']['mean']:.2f} with YaRN untrained, "
        f"{losses['YaRN, phase 1, end']['mean']:.2f} after phase 1 "
        f"and {losses['plain, phase 1, end']['mean']:.2f} after phase 1 without YaRN."
    )


def draw(means: Mapping[str, np.ndarray], plan: Plan):
    """Draws figure 8, one panel per model: context length across, depth down, from red (not found) to green (found)."""
    figure, axes = new_figure(len(means), width=2.9, height=3.0)
    for axis, (grid, mean) in zip(axes, means.items(), strict=True):
        image = axis.imshow(mean, aspect="auto", cmap="RdYlGn", vmin=0, vmax=1)
        axis.set_xticks(range(len(plan.contexts)), [str(context) for context in plan.contexts], rotation=90)
        axis.set_yticks(range(len(DEPTHS)), [f"{100 * depth:.0f}" for depth in DEPTHS])
        axis.set(title=grid, xlabel="context, tokens")
        for length in plan.lengths[:2]:
            axis.axvline(plan.contexts.index(length) + 0.5, color="black", lw=1.0, ls=":")
    axes[0].set_ylabel("depth of the needle, %")
    figure.colorbar(image, ax=axes, label="probability of the right answer")
    return figure


if __name__ == "__main__":
    main()
