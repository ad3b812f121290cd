"""The command `dsv3 train`."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro

from dsv3_jax.bounds import check_bounds
from dsv3_jax.cli.options import notes, parse
from dsv3_jax.config import ModelConfig
from dsv3_jax.data import DataConfig
from dsv3_jax.data.corpus import STDLIB
from dsv3_jax.errors import UserError
from dsv3_jax.model_presets import presets
from dsv3_jax.runs.folder import RunFolder, by_dotted_name
from dsv3_jax.runs.processes import Processes, ending_together, join, leave
from dsv3_jax.sharding.mesh import MeshConfig
from dsv3_jax.terminal import say
from dsv3_jax.training.config import RunConfig, TrainingConfig
from dsv3_jax.training.defaults import default_run

_DESCRIPTION = """Train a DeepSeek-V3 model. If the folder --out already holds the same run, it is resumed.

Examples:
  dsv3 train --preset nano --out runs/nano
  dsv3 train --preset nano --out runs/mine --steps 1000 --data.corpus ~/my-project
  dsv3 train --preset mini --out runs/wide --model.n-routed-experts 64 --training.batch-size 32
  dsv3 train --preset 1b --out runs/1b --mesh.expert 4 --mesh.fsdp 2
  dsv3 train --preset nano --out runs/long --init-from runs/nano --context-factor 40 --data.sequence-length 2048
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
      precision: float32, bfloat16, fp8 (report section 3.3; single choices can be changed: "fp8,promotion=false") or
        auto (bfloat16 where the device computes fast in it, float32 elsewhere).
      init_from: folder of a run or of a published checkpoint, whose weights and architecture a new run starts from.
      context_factor: extend the context of the model's pre-training this many times by YaRN (report section 4.3: 40).
    """

    out: Annotated[str, tyro.conf.arg(help_behavior_hint="(required)")] = ""
    preset: Annotated[str, tyro.conf.arg(help=_PRESET_HELP)] = "nano"
    steps: Annotated[int | None, tyro.conf.arg(help_behavior_hint="(default: the preset's number)")] = None
    precision: str = "auto"
    init_from: Annotated[str, tyro.conf.arg(help_behavior_hint="(default: random weights)")] = ""
    context_factor: Annotated[float | None, tyro.conf.arg(help_behavior_hint="(default: the model's context)")] = None
    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    mesh: MeshConfig
    processes: Processes

    def __post_init__(self) -> None:
        if self.steps is not None:
            check_bounds(self, {"steps": (1, 10**7)}, "training.")
        if self.context_factor is not None:
            check_bounds(self, {"context_factor": (1.0, 1e6)})


def main(argv: list[str]) -> int:
    """Parses the options, trains, and returns the exit code."""
    defaults = _defaults(argv)
    options = parse(TrainOptions, argv, prog="dsv3 train", description=_DESCRIPTION, default=defaults)
    if not options.out:
        raise UserError("--out is missing: give the folder of the run, such as --out runs/nano")
    training = options.training
    if options.steps is not None:
        training = dataclasses.replace(training, steps=options.steps)
    model = options.model
    if options.context_factor is not None:
        model = model.with_context_factor(options.context_factor)
    config = RunConfig(
        preset=options.preset,
        model=model,
        data=_with_absolute_paths(options.data, defaults.data),
        training=training,
        precision=options.precision,
        mesh=options.mesh,
    )
    shared = {
        "out": str(Path(options.out).absolute()),
        "init_from": options.init_from,
        **by_dotted_name(config.to_dict()),
    }
    with notes():
        peers = join(options.processes, shared)
    from dsv3_jax.cli.compilation_cache import keep_compiled_programs
    from dsv3_jax.precision import Precision
    from dsv3_jax.runs.loop import train

    with ending_together(peers), notes():
        Precision.preset(options.precision)
        keep_compiled_programs()
        initial_model = _initial_model(options.init_from, config)
        exit_code = train(config, Path(options.out), initial_model=initial_model, peers=peers).exit_code
    return leave(peers, exit_code)


def _defaults(argv: list[str]) -> TrainOptions:
    """Returns the options before `argv` changes them: those of the run that is resumed, else of the preset."""
    preset, out = _value(argv, "--preset"), _value(argv, "--out")
    run = default_run(preset or "nano")
    source = _value(argv, "--init-from")
    if out and RunFolder(Path(out)).holds_run:
        started = RunFolder(Path(out)).read_config()
        if preset and preset != started.preset:
            raise UserError(f"{out} holds a run of preset {started.preset}, not {preset}; choose another --out")
        run = started
        if source:
            say(f"dsv3: note: {out} holds a run, which goes on: --init-from has no effect", to=sys.stderr)
        source = None
    return TrainOptions(
        out=out or "",
        preset=run.preset,
        precision=run.precision,
        model=_architecture(source) if source else run.model,
        data=_with_tokenizer_of(source, argv, run.data) if source else run.data,
        training=run.training,
        mesh=run.mesh,
        processes=Processes(),
    )


def _value(argv: list[str], option: str) -> str | None:
    """Returns the value of one option before all are parsed; None where it is not given."""
    for word, following in itertools.zip_longest(argv, argv[1:]):
        if word == option:
            return following
        if word.startswith(f"{option}="):
            return word.split("=", 1)[1]
    return None


def _architecture(source: str) -> ModelConfig:
    from dsv3_jax.runs.starting_point import architecture_of_source

    return architecture_of_source(Path(source))


def _with_tokenizer_of(source: str, argv: list[str], data: DataConfig) -> DataConfig:
    """Returns the data with the tokenizer that belongs to the weights, if the user names no other."""
    from dsv3_jax.runs.starting_point import tokenizer_of_source

    if _value(argv, "--data.tokenizer") is not None:
        return data
    return dataclasses.replace(data, tokenizer=str(tokenizer_of_source(Path(source))))


def _with_absolute_paths(data: DataConfig, defaults: DataConfig) -> DataConfig:
    """Returns the data with paths that are right in any folder, from which the run is resumed or evaluated."""
    named = {"corpus": (STDLIB, defaults.corpus), "tokenizer": ("train", "byte", defaults.tokenizer)}
    values = {name: getattr(data, name) for name in named}
    paths = {name: os.path.abspath(value) for name, value in values.items() if value and value not in named[name]}
    return dataclasses.replace(data, **paths)


def _initial_model(source: str, config: RunConfig) -> Any:
    """Returns a function that loads the model which a new run starts from, or None for random weights."""
    if not source:
        return None
    from dsv3_jax.runs.starting_point import load_starting_point

    return functools.partial(load_starting_point, Path(source), config)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
