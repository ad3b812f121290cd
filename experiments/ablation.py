"""What every experiment that trains shares: sizes, arms run by the public trainer, figures, results with their spread.

An arm is one run of `dsv3_jax.runs.loop.train` in a folder of its own: it goes on where it was stopped, and a
finished arm is read, not run again.
"""

from __future__ import annotations

import dataclasses
import functools
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
import matplotlib
from command_line import CommandLine, folder, whole_number
from corpora import write_domains

from dsv3_jax.cli.compilation_cache import keep_compiled_programs
from dsv3_jax.config import ModelConfig
from dsv3_jax.data import DataConfig
from dsv3_jax.errors import UserError
from dsv3_jax.model import DeepSeekV3
from dsv3_jax.runs.folder import RunFolder
from dsv3_jax.runs.loop import train
from dsv3_jax.runs.metrics import read_metrics
from dsv3_jax.training.config import RunConfig, TrainingConfig
from dsv3_jax.training.defaults import default_run
from dsv3_jax.training.schedules import TrainingSchedule

RESULTS = Path(__file__).parent / "results"
SCALES = ("tiny", "small", "1b")
BYTES = 266  # ids of the byte tokenizer


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line of an experiment says.

    Attributes:
      scale: tiny (two CPU cores, minutes), small (hours there, minutes on a GPU) or 1b (a GPU for hours an arm).
      seeds: of weights and data order; every arm runs with each.
      out: where JSON and PNG go.   runs: where the arms' folders lie.
      steps: 0 for the scale's own.
    """

    name: str
    scale: str
    seeds: tuple[int, ...]
    out: Path
    runs: Path
    steps: int

    @property
    def corpus(self) -> Path:
        """The corpus of three domains, made when first asked for; at 1b the standard library is too small for a run."""
        return write_domains(self.runs / "corpus.jsonl", documents=150 if self.scale == "tiny" else 1000)


def parse_options(name: str, description: str | None, argv: Sequence[str] | None = None, *, seeds: int = 2) -> Options:
    """The options that all experiments have."""
    parser = CommandLine(description)
    parser.add_argument("--scale", choices=SCALES, default="tiny")
    parser.add_argument("--seeds", type=whole_number(0), nargs="+", default=list(range(seeds)))
    parser.add_argument("--steps", type=whole_number(0), default=0, help="of every arm; 0: the scale's own")
    parser.add_argument(
        "--out", type=folder, default=None, help="results; experiments/results/<name>[-<scale>] unless given"
    )
    parser.add_argument(
        "--runs", type=folder, default=None, help="the arms' runs, kept; runs/<name>-<scale> unless given"
    )
    given = parser.parse_args(argv)
    if len(set(given.seeds)) < len(given.seeds):
        parser.error("argument --seeds: a seed is named twice; give each once")
    suffix = "" if given.scale == "tiny" else f"-{given.scale}"
    return Options(
        name=name,
        scale=given.scale,
        seeds=tuple(given.seeds),
        out=given.out or RESULTS / f"{name}{suffix}",
        runs=given.runs or Path("runs") / f"{name}-{given.scale}",
        steps=given.steps,
    )


def run_of(options: Options, seed: int, *, steps: int, **training: Any) -> RunConfig:
    """The run that an experiment varies: the scale's model on the corpus of three domains, one seed for everything.

    Args:
      steps: at scale tiny; the other scales have their own.
      training: fields of the TrainingConfig, or of its schedule as `schedule={...}`.
    """
    schedule = training.pop("schedule", {})
    common: dict[str, Any] = {"seed": seed, "sample_tokens": 0, "log_every": 50, "checkpoint_every": 0}
    if options.scale == "tiny":
        plan = {"learning_rate": 3e-3, "warmup_until": 0.05, "constant_until": 0.6, "ramp_until": 0.0, "ramp_from": 1.0}
        return RunConfig(
            preset="tiny",
            model=tiny_model(),
            data=_data(options, seed, 64, 128),
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
    length = run.data.sequence_length
    values = {"steps": options.steps or {"small": 2000, "1b": 5000}[options.scale], "checkpoint_every": 500}
    training = common | values | training
    return dataclasses.replace(
        run,
        model=run.model.replace(vocab_size=BYTES),
        data=_data(options, seed, length, 256),
        training=dataclasses.replace(
            run.training, schedule=dataclasses.replace(run.training.schedule, **schedule), **training
        ),
        precision="auto",
    )


def tiny_model() -> ModelConfig:
    """The preset tiny, a little wider, with 16 experts: the least in which experts have something to divide."""
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
    """One run: its numbers a step, and its last validation."""

    folder: Path
    steps: list[int]
    loss: list[float]
    max_violation: list[float]
    validation: dict[str, Any]

    @property
    def validation_loss(self) -> float:
        """Of the main head, nats a token."""
        return self.validation["main"]["loss"]

    def mean_violation(self) -> float:
        """MaxVio, averaged over the second half of the run."""
        return statistics.fmean(self.max_violation[len(self.max_violation) // 2 :])


def run_arms(
    options: Options,
    arms: Mapping[str, Callable[[int], RunConfig]],
    starts: Mapping[str, Callable[[RunConfig], DeepSeekV3]] | None = None,
) -> dict[str, list[ArmResult]]:
    """Every arm with every seed, finished ones read from their folders.

    Args:
      starts: of the arms that do not start from the seed's own weights, what they start from.
    """
    keep_compiled_programs()
    results: dict[str, list[ArmResult]] = {name: [] for name in arms}
    total = len(arms) * len(options.seeds)
    for number, (seed, name) in enumerate((seed, name) for seed in options.seeds for name in arms):
        folder = options.runs / f"{name.replace(' ', '_')}-{seed}"
        print(f"[{number + 1}/{total}] {options.name}: {name}, seed {seed}", flush=True)
        config = arms[name](seed)
        start = starts.get(name) if starts else None
        given = {"initial_model": functools.partial(start, config)} if start else {}
        results[name].append(run_arm(config, folder, **given))
    return results


def run_arm(config: RunConfig, folder: Path, **start: Any) -> ArmResult:
    """One run to its end, or what it left if it has ended; ends the process where the run was interrupted."""
    run = RunFolder(folder)
    if not run.summary.exists():
        began = time.perf_counter()
        try:
            exit_code = train(config, folder, **start).exit_code
        except UserError as error:
            print(error, file=sys.stderr)
            sys.exit(2)
        if exit_code == 3 and not run.summary.exists():
            print("    not finite: the arm diverged", flush=True)
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


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation over the seeds, and the values themselves."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "standard_deviation": deviation, "values": list(values)}


def paired(arm: Sequence[float], base: Sequence[float]) -> dict[str, Any]:
    """Differences seed by seed: what a seed does to both arms alike cancels."""
    return spread([a - b for a, b in zip(arm, base, strict=True)])


def show(value: Mapping[str, Any], digits: int = 4) -> str:
    """mean ± deviation."""
    deviation = value["standard_deviation"]
    return f"{value['mean']:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def smoothed(values: Sequence[float], decay: float = 0.9) -> list[float]:
    """Exponential moving average, as the report smooths its curves (appendix B.1), without the pull of its start."""
    total = weight = 0.0
    out = []
    for value in values:
        total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        out.append(total / weight)
    return out


def new_figure(columns: int, width: float = 5.0, height: float = 3.6) -> tuple[Any, Any]:
    """A figure that needs no screen, and its axes."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, columns, figsize=(width * columns, height), squeeze=False, layout="constrained")
    return figure, axes[0]


def legend_below(figure: Any, axis: Any) -> None:
    """One legend for all panels, of what `axis` shows, below them: no curve lies under it."""
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)


def write_results(options: Options, figures: Mapping[str, Any], verdict: str, numbers: Mapping[str, Any]) -> None:
    """<name>.json and one PNG a figure: numbers, the verdict in one sentence, and what they were measured on."""
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
