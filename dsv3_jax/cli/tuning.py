"""What the commands that train a model on samples have in common: `dsv3 sft` and `dsv3 reward-model`."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Protocol

import tyro

from dsv3_jax.bounds import check_bounds
from dsv3_jax.cli.run_options import train_together, value_of, with_absolute_paths
from dsv3_jax.data.config import Form
from dsv3_jax.errors import UserError
from dsv3_jax.runs.folder import RunFolder
from dsv3_jax.runs.processes import Processes
from dsv3_jax.sharding.mesh import MeshConfig
from dsv3_jax.training.config import RunConfig, TrainingConfig
from dsv3_jax.training.defaults import default_run


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuningOptions:
    """The options that the commands have in common.

    Attributes:
      data: file of JSON lines or Parquet, or a folder of such files.
      out: folder of the new run.
      epochs: passes over the data, which set the number of steps of a new run.
      steps: number of optimizer steps, instead of --epochs.
      learning_rate: peak learning rate, the same as --training.schedule.learning-rate. The default falls by a cosine to
        a fifth; it is the report's 5e-6, times what the model's pre-training had more than the report's.
      drop_unknown_roles: leave out samples with a role that is not system, user or assistant.
      drop_empty_turns: leave out samples that are empty, or in which a turn is.
      drop_overlong: leave out samples that are longer than a row.
      sequence_length: input tokens of a row.
      validation_fraction: fraction of the samples that are held out.
      tokenizer: the tokenizer that the weights belong to.
      precision: float32, bfloat16, fp8 or auto, as for `dsv3 train`.
    """

    data: Annotated[str, tyro.conf.arg(help_behavior_hint="(required)")] = ""
    out: Annotated[str, tyro.conf.arg(help_behavior_hint="(required)")] = ""
    epochs: float = 2.0
    steps: Annotated[int | None, tyro.conf.arg(help_behavior_hint="(default: from --epochs)")] = None
    learning_rate: Annotated[float | None, tyro.conf.arg(help_behavior_hint="(default: scaled)")] = None
    drop_unknown_roles: bool = False
    drop_empty_turns: bool = False
    drop_overlong: bool = False
    sequence_length: int
    validation_fraction: float
    tokenizer: str
    precision: str = "auto"
    training: TrainingConfig
    mesh: MeshConfig
    processes: Processes

    def __post_init__(self) -> None:
        check_bounds(self, {"epochs": (1e-6, 1e6)}, "")
        if self.steps is not None:
            check_bounds(self, {"steps": (1, 10**7)}, "training.")


_OF_DATA = (
    *("drop_unknown_roles", "drop_empty_turns", "drop_overlong"),
    *("sequence_length", "validation_fraction", "tokenizer"),
)
"""Options that are fields of `DataConfig`."""


def common_defaults(base: RunConfig) -> dict[str, Any]:
    """Returns the options of `TuningOptions` as they are in a run."""
    run = {"data": base.data.corpus, "precision": base.precision, "training": base.training, "mesh": base.mesh}
    return run | {"processes": Processes(), **{name: getattr(base.data, name) for name in _OF_DATA}}


def with_common_options(base: RunConfig, options: TuningOptions) -> RunConfig:
    """Returns the run with what the common options ask for."""
    training, schedule = options.training, options.training.schedule
    if options.learning_rate is not None:
        schedule = dataclasses.replace(schedule, learning_rate=options.learning_rate)
    training = dataclasses.replace(training, schedule=schedule)
    if options.steps is not None:
        training = dataclasses.replace(training, steps=options.steps)
    data = dataclasses.replace(base.data, corpus=options.data, **{name: getattr(options, name) for name in _OF_DATA})
    return dataclasses.replace(
        base,
        data=dataclasses.replace(with_absolute_paths(data, base.data), corpus=os.path.abspath(options.data)),
        training=training,
        precision=options.precision,
        mesh=options.mesh,
    )


class _Parse[Options: TuningOptions](Protocol):
    def __call__(self, flags: list[str], base: RunConfig) -> Options: ...


@dataclasses.dataclass(frozen=True)
class Tuning[Options: TuningOptions]:
    """One of the commands.

    Attributes:
      command: its name.
      form: the form of its data.
      example: a folder for `--out`, in messages.
      data: what `--data` names, in messages.
      default: returns the default run, given the folder of the model and the data.
      parse: returns the options, those that are not given being as in a run.
      configure: returns the run that the options ask for, given the default or resumed run and the model's folder.
      say: says what will be trained.
    """

    command: str
    form: Form
    example: str
    data: str
    default: Callable[[Path, str], RunConfig]
    parse: _Parse[Options]
    configure: Callable[[RunConfig, Options, Path], RunConfig]
    say: Callable[[RunConfig], None]

    def run(self, argv: list[str]) -> int:
        """Trains and returns the exit code.

        Args:
          argv: the folder of the model, and options.
        """
        from dsv3_jax.runs.fine_tuning import fine_tuning_of
        from dsv3_jax.runs.starting_point import load_starting_point

        if any(word in ("-h", "--help") for word in argv):
            self.parse(argv, fine_tuning_of(default_run("nano"), "FILE", "byte"))
        if not argv or argv[0].startswith("-"):
            raise UserError(
                "give the folder of a run or a published checkpoint first: "
                f"dsv3 {self.command} runs/nano --data FILE --out {self.example}"
            )
        source, flags = argv[0], argv[1:]
        out, data = value_of(flags, "--out"), value_of(flags, "--data")
        if not out:
            raise UserError(f"--out is missing: give the folder of the new run, such as --out {self.example}")
        resumed = RunFolder(Path(out)).holds_run
        if resumed:
            base = RunFolder(Path(out)).read_config()
            if base.data.form != self.form:
                other = {"text": "train", "conversations": "sft", "preferences": "reward-model"}[base.data.form]
                raise UserError(f"{out} holds a run of dsv3 {other}; choose another --out")
        elif not data:
            raise UserError(f"--data is missing: give a file or folder of {self.data}")
        else:
            base = self.default(Path(source), data)
            if value_of(flags, "--lora.rank") and not value_of(flags, "--training.optimizer"):
                base = _by_adamw(base)
        options = self.parse(flags, base)
        config = self.configure(base, options, Path(source))
        self.say(config)
        by_steps = resumed or options.steps is not None
        start = {
            "initial_model": functools.partial(load_starting_point, Path(source), config),
            "epochs": None if by_steps else options.epochs,
        }
        return train_together(config, options.out, options.processes, {"init_from": source}, lambda: start)


def _by_adamw(run: RunConfig) -> RunConfig:
    """Returns the run with AdamW and no QK-clip, as low-rank adapters need it, also of a model trained with Muon."""
    return dataclasses.replace(run, training=dataclasses.replace(run.training, optimizer="adamw", qk_clip=0.0))
