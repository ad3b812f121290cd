"""Shared code of the experiments that train: options, model sizes, running the arms, figures, and result files.

An arm is one variant that an experiment compares. For each seed it is an ordinary training run in a folder of its own:
an interrupted run is resumed, and the results of a finished run are read instead of running it again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from command_line import CommandLine, folder, whole_number
from corpora import DOMAINS, write_domains
from jaxtyping import Int
from matplotlib.figure import Figure

from dsv3_jax import DeepSeekV3, ModelConfig, UserError, default_run, train
from dsv3_jax.cli.compilation_cache import keep_compiled_programs
from dsv3_jax.data import DataConfig
from dsv3_jax.runs.evaluation import load_run_with_data
from dsv3_jax.runs.folder import RunFolder
from dsv3_jax.runs.metrics import read_metrics
from dsv3_jax.training.config import RunConfig, TrainingConfig
from dsv3_jax.training.schedules import TrainingSchedule

RESULTS = Path(__file__).parent / "results"
SCALES = ("tiny", "small", "1b")
BYTES = 266  # vocabulary size of the byte tokenizer


@dataclasses.dataclass(frozen=True)
class Options:
    """The command-line options of an experiment.

    Attributes:
      name: name of the experiment, and of its result files.
      scale: tiny (minutes on two CPU cores), small (hours on two CPU cores, minutes on a GPU) or 1b (hours per arm on a
        GPU).
      seeds: seeds of the initial weights and the data order; every arm runs once with each.
      out: folder for the JSON file and the figures.
      runs: folder that holds the training runs of the arms.
      steps: optimizer steps of every arm; 0 takes the number that the scale prescribes.
      arms: the arms to run, where the experiment lets them be chosen.
    """

    name: str
    scale: str
    seeds: tuple[int, ...]
    out: Path
    runs: Path
    steps: int
    arms: tuple[str, ...] = ()

    @property
    def corpus(self) -> Path:
        """Path of the corpus of three domains, which is written on first use.

        It is too small for a long run at scale 1b.
        """
        return write_domains(self.runs / "corpus.jsonl", documents=150 if self.scale == "tiny" else 1000)


def parse_options(
    name: str,
    description: str | None,
    argv: Sequence[str] | None = None,
    *,
    seeds: int = 2,
    runs_of: str = "",
    arms: Sequence[str] = (),
    compared: Sequence[str] = (),
) -> Options:
    """Parses the options that all experiments have.

    Args:
      seeds: number of seeds by default, counted from 0.
      runs_of: the experiment whose folder of runs is used by default, where it has runs that this one needs too.
      arms: the arms of an experiment with an option `--arms`, which chooses among them.
      compared: those of `arms` that run whatever is chosen, because the claim is about them.
    """
    parser = CommandLine(description)
    if arms:
        parser.add_argument(
            "--arms",
            choices=arms,
            nargs="+",
            default=list(arms),
            help=f"arms to run (default: all); {', '.join(map(repr, compared))} always run",
        )
    options, given = parse_more_options(name, parser, argv, seeds=seeds, runs_of=runs_of)
    chosen = {*compared, *given.arms} if arms else ()
    return dataclasses.replace(options, arms=tuple(arm for arm in arms if arm in chosen))


def parse_more_options(
    name: str, parser: CommandLine, argv: Sequence[str] | None, *, seeds: int = 2, runs_of: str = ""
) -> tuple[Options, argparse.Namespace]:
    """Parses the options that all experiments have together with those that `parser` has already."""
    parser.add_argument(
        "--scale",
        choices=SCALES,
        default="tiny",
        help="size of the model: tiny (minutes on two CPU cores, the default), small (the preset nano) or 1b (a GPU)",
    )
    parser.add_argument(
        "--seeds",
        type=whole_number(0),
        nargs="+",
        default=list(range(seeds)),
        help=f"seeds of weights and data; every arm runs with each (default: 0 to {seeds - 1})",
    )
    parser.add_argument(
        "--steps", type=whole_number(0), default=0, help="optimizer steps of every arm (default: set by the scale)"
    )
    parser.add_argument(
        "--out", type=folder, default=None, help="folder of the results (default: experiments/results/<name>[-<scale>])"
    )
    parser.add_argument(
        "--runs",
        type=folder,
        default=None,
        help=f"folder of the training runs (default: runs/{runs_of or name}-<scale>)",
    )
    given = parser.parse_args(argv)
    if len(set(given.seeds)) < len(given.seeds):
        parser.error("argument --seeds: a seed is named twice; give each once")
    suffix = "" if given.scale == "tiny" else f"-{given.scale}"
    options = Options(
        name=name,
        scale=given.scale,
        seeds=tuple(given.seeds),
        out=given.out or RESULTS / f"{name}{suffix}",
        runs=given.runs or Path("runs") / f"{runs_of or name}-{given.scale}",
        steps=given.steps,
    )
    return options, given


def run_of(options: Options, seed: int, *, steps: int, data: DataConfig | None = None, **training: Any) -> RunConfig:
    """Returns the run configuration that an experiment varies: the scale's model on the corpus of three domains.

    Args:
      seed: seed of the initial weights and of the data.
      steps: optimizer steps at scale tiny; the other scales prescribe their own number.
      data: other data than the corpus of three domains.
      training: changed fields of the TrainingConfig; `schedule={...}` changes fields of its schedule.
    """
    schedule = training.pop("schedule", {})
    common: dict[str, Any] = {"seed": seed, "sample_tokens": 0, "log_every": 50, "checkpoint_every": 0}
    if options.scale == "tiny":
        data = data or _data(options, seed, 64, 128)
        plan = {"learning_rate": 3e-3, "warmup_until": 0.05, "constant_until": 0.6, "ramp_until": 0.0, "ramp_from": 1.0}
        return RunConfig(
            preset="tiny",
            model=tiny_model().replace(vocab_size=data.vocab_size),
            data=data,
            training=TrainingConfig(
                steps=options.steps or steps,
                batch_size=8,
                schedule=TrainingSchedule(**(plan | {"bias_update_speed": 0.005} | schedule)),
                **(common | training),
            ),
            precision="float32",
        )
    preset = {"small": "nano", "1b": "1b"}[options.scale]
    run = default_run(preset)
    data = data or _data(options, seed, run.data.sequence_length, 256)
    values = {"steps": options.steps or {"small": 2000, "1b": 5000}[options.scale], "checkpoint_every": 500}
    training = common | values | training
    return dataclasses.replace(
        run,
        model=run.model.replace(vocab_size=data.vocab_size),
        data=data,
        training=dataclasses.replace(
            run.training, schedule=dataclasses.replace(run.training.schedule, **schedule), **training
        ),
        precision="auto",
    )


def tiny_model() -> ModelConfig:
    """Returns the preset tiny, widened and with 16 experts: about the smallest model whose experts can specialise."""
    return ModelConfig.preset(
        "tiny",
        vocab_size=BYTES,
        hidden_size=64,
        intermediate_size=128,
        n_routed_experts=16,
        moe_intermediate_size=32,
        num_attention_heads=4,
        q_lora_rank=32,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
    )


def _data(options: Options, seed: int, length: int, rows: int) -> DataConfig:
    """Returns the data of a run: rows of `length` tokens, at most `rows` of them for validation."""
    return DataConfig(
        corpus=str(options.corpus),
        tokenizer="byte",
        vocab_size=BYTES,
        sequence_length=length,
        fill_in_middle_rate=0.0,
        validation_fraction=0.1,
        validation_sequences=rows,
        seed=seed,
    )


@dataclasses.dataclass(frozen=True)
class ArmResult:
    """The results of one training run.

    Attributes:
      folder: the run's folder.
      steps, loss, max_violation: number, main head's loss in nats per token, and MaxVio of every optimizer step.
      validation: the last validation, as `summary.json` has it.
    """

    folder: Path
    steps: list[int]
    loss: list[float]
    max_violation: list[float]
    validation: dict[str, Any]

    @property
    def validation_loss(self) -> float:
        """Final validation loss of the main head, in nats per token."""
        return self.validation["main"]["loss"]

    def mean_violation(self) -> float:
        """Returns MaxVio averaged over the second half of the run."""
        return statistics.fmean(self.max_violation[len(self.max_violation) // 2 :])


def run_arms(
    options: Options,
    arms: Mapping[str, Callable[[int], RunConfig]],
    starts: Mapping[str, Callable[[RunConfig], DeepSeekV3]] | None = None,
) -> dict[str, list[ArmResult]]:
    """Runs every arm with every seed and returns the results of each arm, one per seed.

    Args:
      arms: for each arm, a function from the seed to the run's configuration.
      starts: for each arm that does not start from freshly initialised weights, a function from the configuration to
        the model it starts from.
    """
    keep_compiled_programs()
    results: dict[str, list[ArmResult]] = {name: [] for name in arms}
    total = len(arms) * len(options.seeds)
    for number, (seed, name) in enumerate((seed, name) for seed in options.seeds for name in arms):
        folder = options.runs / f"{name.replace(' ', '_')}-{seed}"
        print(f"[{number + 1}/{total}] {options.name}: {name}, seed {seed}", flush=True)
        config = arms[name](seed)
        start = starts.get(name) if starts else None
        given = {"initial_model": lambda devices, start=start, config=config: start(config)} if start else {}
        results[name].append(run_arm(config, folder, **given))
    return results


def byte_data(corpus: Path, *, length: int, seed: int) -> DataConfig:
    """Returns rows of `length` tokens of documents that do not see each other, a token for each byte."""
    return DataConfig(
        corpus=str(corpus),
        tokenizer="byte",
        vocab_size=BYTES,
        sequence_length=length,
        fill_in_middle_rate=0.0,
        isolate_documents=True,
        seed=seed,
    )


def run_arm(config: RunConfig, folder: Path, **start: Any) -> ArmResult:
    """Runs one arm to its end, or reads its results if it has finished. Exits the process if the run was interrupted.

    Args:
      start: `initial_model=`, a function from the devices to the model to start from.
    """
    run = RunFolder(folder)
    if not run.summary.exists():
        began = time.perf_counter()
        try:
            exit_code = train(config, folder, **start).exit_code
        except UserError as error:
            print(error, file=sys.stderr)
            sys.exit(2)
        if exit_code == 3 and not run.summary.exists():
            print("    the loss is not finite: the arm diverged", flush=True)
        elif exit_code:
            sys.exit(exit_code)
        print(f"    {time.perf_counter() - began:.0f} s", flush=True)
    records = [record for record in read_metrics(run.metrics) if "main_loss" in record]
    diverged = {"main": {"loss": float("nan"), "bits_per_byte": float("nan")}, "mtp": [], "mtp_acceptance": []}
    validation = json.loads(run.summary.read_text())["validation"] if run.summary.exists() else diverged
    return ArmResult(
        folder=folder,
        steps=[int(record["step"]) for record in records],
        loss=[float(record["main_loss"]) for record in records],
        max_violation=[float(record["max_violation"]) for record in records],
        validation=validation,
    )


def open_trained(folder: Path) -> tuple[DeepSeekV3, dict[str, Int[np.ndarray, "rows T"]]]:
    """Returns the model that a run has reached, and for each domain its held-out text, cut into rows of tokens."""
    loaded, data = load_run_with_data(folder)
    rows = {}
    length = data.config.sequence_length
    for domain in DOMAINS:
        texts = [document.text for document in data.documents("validation") if document.domain == domain]
        ids = np.asarray(data.tokenizer.encode("\n".join(texts)), np.int32)
        rows[domain] = ids[: len(ids) // length * length].reshape(-1, length)
    return loaded.model, rows


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Returns the mean, the standard deviation (None for one value) and the values, which are one per seed."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "standard_deviation": deviation, "values": list(values)}


def paired(arm: Sequence[float], base: Sequence[float]) -> dict[str, Any]:
    """Returns the spread of the differences taken seed by seed, in which effects of the seed on both arms cancel."""
    return spread([a - b for a, b in zip(arm, base, strict=True)])


def show(value: Mapping[str, Any], digits: int = 4) -> str:
    """Formats a spread as "mean ± standard deviation"."""
    deviation = value["standard_deviation"]
    return f"{value['mean']:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def smoothed(values: Sequence[float], decay: float = 0.9) -> list[float]:
    """Returns the exponential moving average (appendix B.1), corrected for its start as Adam corrects its moments."""
    total = weight = 0.0
    out = []
    for value in values:
        total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        out.append(total / weight)
    return out


def new_figure(columns: int, width: float = 5.0, height: float = 3.6) -> tuple[Figure, Any]:
    """Returns a figure of `columns` panels side by side, and its axes; sizes are per panel, in inches."""
    figure = Figure(figsize=(width * columns, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def legend_below(figure: Figure, axis: Any) -> None:
    """Draws one legend for all panels below them, with the labels of `axis`."""
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)


def write_results(options: Options, figures: Mapping[str, Figure], verdict: str, numbers: Mapping[str, Any]) -> None:
    """Writes <name>.json (numbers, verdict, device, versions) and one PNG for each figure."""
    options.out.mkdir(parents=True, exist_ok=True)
    device = jax.devices()[0]
    result = {
        "experiment": options.name,
        "verdict": verdict,
        "scale": options.scale,
        "seeds": list(options.seeds),
        "device": device.device_kind if device.platform != "cpu" else f"CPU, {platform.machine()}",
        "versions": {name: version(name) for name in ("jax", "flax", "optax", "numpy")}
        | {"python": platform.python_version()},
        **numbers,
    }
    (options.out / f"{options.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    for name, figure in figures.items():
        figure.savefig(options.out / f"{name}.png", dpi=130)
    print(f"{verdict}\nresults in {options.out}")
