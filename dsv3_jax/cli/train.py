"""The command `dsv3 train`."""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro

from dsv3_jax.bounds import check_bounds
from dsv3_jax.cli.fields import read_toml, with_table
from dsv3_jax.cli.options import parse
from dsv3_jax.cli.run_options import train_together, value_of, with_absolute_paths, with_absolute_run
from dsv3_jax.config import ModelConfig
from dsv3_jax.data import DataConfig
from dsv3_jax.errors import ConfigError, UserError
from dsv3_jax.model_presets import presets
from dsv3_jax.runs.folder import RunFolder
from dsv3_jax.runs.processes import Processes
from dsv3_jax.sharding.mesh import MeshConfig
from dsv3_jax.terminal import say
from dsv3_jax.training.config import LoraConfig, RunConfig, TeacherConfig, TrackerName, TrainingConfig
from dsv3_jax.training.defaults import default_run

_DESCRIPTION = """Train a DeepSeek-V3 model. If the folder --out already holds the same run, it is resumed.

Examples:
  dsv3 train --preset nano --out runs/nano
  dsv3 train --preset nano --out runs/mine --steps 1000 --data.corpus ~/my-project
  dsv3 train --preset mini --out runs/wide --model.n-routed-experts 64 --training.batch-size 32
  dsv3 train --preset 1b --out runs/1b --mesh.expert 4 --mesh.fsdp 2
  dsv3 train --preset nano --out runs/long --init-from runs/nano --context-factor 40 --data.sequence-length 2048
  dsv3 train --out runs/more --continue-from runs/nano --step 200 --steps 800 --data.corpus ~/my-project
  dsv3 train --config runs/nano/run.toml --out runs/again --training.seed 1
  dsv3 train --preset 1b --out /shared/1b --processes.coordinator node0:1234 --processes.count 2 --processes.index 0
"""
_PRESET_HELP = (
    f"preset that gives the defaults of all other options: {', '.join(presets())}. A resumed run keeps its own options."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """The options of `dsv3 train`.

    Attributes:
      out: folder of the run.
      steps: number of optimizer steps, the same as --training.steps.
      tracker: tensorboard, wandb, trackio or none, the same as --training.tracker.
      precision: float32, bfloat16, fp8 (report section 3.3; single choices can be changed: "fp8,promotion=false") or
        auto (bfloat16 where the device computes fast in it, float32 elsewhere: a new run finds out and keeps it).
      init_from: folder of a run or of a published checkpoint, whose weights and architecture a new run starts from, at
        step 0 with a new optimizer.
      continue_from: folder of a run that a new run goes on from, with its optimizer and schedules, at its step; --steps
        can make it longer, and with another --data.corpus the new one is read from its start.
      step: step of the checkpoint that --init-from or --continue-from takes.
      config: a TOML file of options, such as the run.toml of another run; options of the command line win over it.
      context_factor: extend the context of the model's pre-training this many times by YaRN (report section 4.3: 40).
    """

    out: Annotated[str, tyro.conf.arg(help_behavior_hint="(required)")] = ""
    preset: Annotated[str, tyro.conf.arg(help=_PRESET_HELP)] = "nano"
    steps: Annotated[int | None, tyro.conf.arg(help_behavior_hint="(default: the preset's number)")] = None
    tracker: Annotated[TrackerName | None, tyro.conf.arg(help_behavior_hint="(default: the run's)")] = None
    precision: str = "auto"
    init_from: Annotated[str, tyro.conf.arg(help_behavior_hint="(default: random weights)")] = ""
    continue_from: Annotated[str, tyro.conf.arg(help_behavior_hint="(default: nothing)")] = ""
    step: Annotated[int | None, tyro.conf.arg(help_behavior_hint="(default: the newest)")] = None
    config: Annotated[str, tyro.conf.arg(help_behavior_hint="(default: no file)")] = ""
    context_factor: Annotated[float | None, tyro.conf.arg(help_behavior_hint="(default: the model's context)")] = None
    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    lora: LoraConfig
    teacher: TeacherConfig
    mesh: MeshConfig
    processes: Processes

    def __post_init__(self) -> None:
        if self.steps is not None:
            check_bounds(self, {"steps": (1, 10**7)}, "training.")
        if self.step is not None:
            check_bounds(self, {"step": (0, 10**18)})
            if not (self.init_from or self.continue_from):
                raise ConfigError("--step needs --init-from or --continue-from: a run in --out goes on from its newest")
        if self.init_from and self.continue_from:
            raise ConfigError("--init-from takes only weights, --continue-from the optimizer too: give one of them")
        if self.context_factor is not None:
            check_bounds(self, {"context_factor": (1.0, 1e6)})


def main(argv: list[str]) -> int:
    """Parses the options, trains, and returns the exit code."""
    defaults = _defaults(argv)
    options = parse(argv, prog="dsv3 train", description=_DESCRIPTION, default=defaults)
    if not options.out:
        raise UserError("--out is missing: give the folder of the run, such as --out runs/nano")
    training = options.training
    if options.steps is not None:
        training = dataclasses.replace(training, steps=options.steps)
    if options.tracker is not None:
        training = dataclasses.replace(training, tracker=options.tracker)
    model = options.model
    if options.context_factor is not None:
        model = model.with_context_factor(options.context_factor)
    config = RunConfig(
        preset=options.preset,
        model=model,
        data=with_absolute_paths(options.data, defaults.data),
        training=training,
        lora=options.lora,
        teacher=with_absolute_run(options.teacher),
        precision=options.precision,
        mesh=options.mesh,
    )
    named = {"init_from": options.init_from, "continue_from": options.continue_from, "step": options.step}
    return train_together(config, options.out, options.processes, named, lambda: _started(options, config))


def _defaults(argv: list[str]) -> TrainOptions:
    """Returns the options before `argv` changes them: those of the run that is resumed, else of the preset."""
    preset, out = value_of(argv, "--preset"), value_of(argv, "--out")
    file = value_of(argv, "--config")
    table = read_toml(Path(file)) if file else {}
    if preset and table.get("preset", preset) != preset:
        raise UserError(f"{file} is of preset {table['preset']}, not {preset}: leave out --preset, or that line")
    preset, out = preset or table.get("preset"), out or table.get("out")
    run = default_run(str(preset or "nano"))
    source = value_of(argv, "--init-from") or table.get("init_from")
    origin = value_of(argv, "--continue-from") or table.get("continue_from")
    if origin and not (out and RunFolder(Path(out)).holds_run):
        run = RunFolder(Path(origin)).read_config()
        if preset and preset != run.preset:
            raise UserError(f"{origin} holds a run of preset {run.preset}, not {preset}; leave out --preset")
    if out and RunFolder(Path(out)).holds_run:
        started = RunFolder(Path(out)).read_config()
        if preset and preset != started.preset:
            raise UserError(f"{out} holds a run of preset {started.preset}, not {preset}; choose another --out")
        run = started
        for option, given in (("--init-from", source), ("--continue-from", origin)):
            if given:
                say(f"dsv3: note: {out} holds a run, which goes on: {option} has no effect", to=sys.stderr)
        source = None
    defaults = TrainOptions(
        out=out or "",
        preset=run.preset,
        precision=run.precision,
        model=_architecture(source) if source else run.model,
        data=_with_tokenizer_of(source, argv, run.data) if source else run.data,
        training=run.training,
        lora=run.lora,
        teacher=run.teacher,
        mesh=run.mesh,
        processes=Processes(),
    )
    options = with_table(defaults, table, f"{file}: ")
    return dataclasses.replace(options, data=with_absolute_paths(options.data, run.data))


def _architecture(source: str) -> ModelConfig:
    from dsv3_jax.runs.starting_point import architecture_of_source

    return architecture_of_source(Path(source))


def _with_tokenizer_of(source: str, argv: list[str], data: DataConfig) -> DataConfig:
    """Returns the data with the tokenizer that belongs to the weights, if the user names no other."""
    from dsv3_jax.runs.starting_point import tokenizer_of_source

    if value_of(argv, "--data.tokenizer") is not None:
        return data
    return dataclasses.replace(data, tokenizer=str(tokenizer_of_source(Path(source))))


def _started(options: TrainOptions, config: RunConfig) -> dict[str, Any]:
    """Returns the arguments of `train` that say what a new run starts from; none for random weights."""
    if options.continue_from:
        from dsv3_jax.runs.start import Continuation

        return {"continuation": Continuation(RunFolder(Path(options.continue_from)), options.step)}
    if not options.init_from:
        return {}
    from dsv3_jax.runs.starting_point import load_starting_point

    return {"initial_model": functools.partial(load_starting_point, Path(options.init_from), config, step=options.step)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
