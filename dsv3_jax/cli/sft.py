"""The command `dsv3 sft`: supervised fine-tuning."""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dsv3_jax.bounds import check_bounds
from dsv3_jax.cli.options import parse
from dsv3_jax.cli.run_options import train_together, value_of, with_absolute_paths, with_absolute_run
from dsv3_jax.data.config import LossOn
from dsv3_jax.errors import UserError
from dsv3_jax.runs.folder import RunFolder
from dsv3_jax.runs.processes import Processes
from dsv3_jax.sharding.mesh import MeshConfig
from dsv3_jax.terminal import say
from dsv3_jax.training.config import LoraConfig, RunConfig, TeacherConfig, TrainingConfig
from dsv3_jax.training.defaults import default_run

_DESCRIPTION = """Fine-tune the model in folder RUN (a run or a published checkpoint) on conversations.

The result is a run. If the folder --out already holds the same run, it is resumed. A line of the data is one of

  {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
  {"prompt": "...", "completion": "..."}        as `dsv3 sample` writes; both may be lists of messages
  {"text": "..."}

Rows hold whole samples, which do not see each other. The loss counts what the assistant says (--loss-on).

With --teacher.run the model also learns another model's distribution of the next token (distillation on logits).

With --lora.rank only low-rank adapters are trained, which `dsv3 export-hf` adds to the weights.

Examples:
  dsv3 sft runs/nano --data chats.jsonl --out runs/chat
  dsv3 sft runs/nano --data right.jsonl --out runs/better --epochs 3 --learning-rate 1e-4
  dsv3 sft runs/nano --data chats.jsonl --out runs/lora --lora.rank 8 --learning-rate 2e-4
  dsv3 sft runs/nano --data chats.jsonl --out runs/student --teacher.run runs/large --teacher.weight 0.8
  dsv3 sft checkpoints/moonlight --data chats/ --out runs/moonlight-chat --mesh.fsdp 8
"""
_OF_DATA = (
    *("loss_on", "drop_unknown_roles", "drop_empty_turns", "drop_without_target", "drop_overlong"),
    *("sequence_length", "validation_fraction", "tokenizer"),
)
"""Options that are fields of `DataConfig`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftOptions:
    """The options of `dsv3 sft`.

    Attributes:
      data: file of JSON lines or Parquet, or a folder of such files.
      out: folder of the new run.
      epochs: passes over the data, which set the number of steps of a new run.
      steps: number of optimizer steps, instead of --epochs.
      learning_rate: peak learning rate, the same as --training.schedule.learning-rate. The default falls by a cosine to
        a fifth; it is the report's 5e-6, times what the model's pre-training had more than the report's.
      router_bias: whether the biases that balance the experts stay as they are ("frozen") or go on "moving".
      mtp: train the multi-token prediction modules too.
      loss_on: which tokens the model learns to write: the "assistant"'s, those of its "last" turn, or "all".
      drop_unknown_roles: leave out conversations with a role that is not system, user or assistant.
      drop_empty_turns: leave out conversations that are empty, or in which a turn is.
      drop_without_target: leave out conversations in which there is nothing to learn to write.
      drop_overlong: leave out conversations of more than --sequence-length + 1 tokens.
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
    router_bias: Literal["frozen", "moving"] = "frozen"
    mtp: bool = True
    loss_on: LossOn = "assistant"
    drop_unknown_roles: bool = False
    drop_empty_turns: bool = False
    drop_without_target: bool = False
    drop_overlong: bool = False
    sequence_length: int
    validation_fraction: float
    tokenizer: str
    precision: str = "auto"
    lora: LoraConfig
    teacher: TeacherConfig
    training: TrainingConfig
    mesh: MeshConfig
    processes: Processes

    def __post_init__(self) -> None:
        check_bounds(self, {"epochs": (1e-6, 1e6)}, "")
        if self.steps is not None:
            check_bounds(self, {"steps": (1, 10**7)}, "training.")


def main(argv: list[str]) -> int:
    """Fine-tunes a model and returns the exit code.

    Args:
      argv: the folder of the model, and options.
    """
    from dsv3_jax.runs.fine_tuning import default_fine_tuning, describe_fine_tuning, fine_tuning_of
    from dsv3_jax.runs.starting_point import load_starting_point

    if any(word in ("-h", "--help") for word in argv):
        _parse(argv, fine_tuning_of(default_run("nano"), "FILE", "byte"))
    if not argv or argv[0].startswith("-"):
        raise UserError("give the folder of a run or a published checkpoint first: dsv3 sft runs/nano --data FILE ...")
    source, flags = argv[0], argv[1:]
    out, data = value_of(flags, "--out"), value_of(flags, "--data")
    if not out:
        raise UserError("--out is missing: give the folder of the new run, such as --out runs/chat")
    resumed = RunFolder(Path(out)).holds_run
    if resumed:
        base = RunFolder(Path(out)).read_config()
        if base.data.form != "conversations":
            raise UserError(f"{out} holds a run of dsv3 train; choose another --out")
    elif not data:
        raise UserError("--data is missing: give a file or folder of conversations, such as --data chats.jsonl")
    else:
        base = default_fine_tuning(Path(source), data)
    options = _parse(flags, base)
    config = _configured(base, options, source)
    say(describe_fine_tuning(config))
    by_steps = resumed or options.steps is not None
    start = {
        "initial_model": functools.partial(load_starting_point, Path(source), config),
        "epochs": None if by_steps else options.epochs,
    }
    return train_together(config, options.out, options.processes, {"init_from": source}, lambda: start)


def _parse(flags: list[str], base: RunConfig) -> SftOptions:
    """Returns the options; those that `flags` does not give are as in `base`."""
    schedule = base.training.schedule
    default = SftOptions(
        data=base.data.corpus,
        router_bias="moving" if schedule.bias_update_speed else "frozen",
        mtp=schedule.mtp_weight > 0,
        precision=base.precision,
        lora=base.lora,
        teacher=base.teacher,
        training=base.training,
        mesh=base.mesh,
        processes=Processes(),
        **{name: getattr(base.data, name) for name in _OF_DATA},
    )
    return parse(flags, prog="dsv3 sft RUN", description=_DESCRIPTION, default=default)


def _configured(base: RunConfig, options: SftOptions, source: str) -> RunConfig:
    """Returns the run that the options ask for."""
    from dsv3_jax.runs.fine_tuning import moving_bias_speed

    training, schedule = options.training, options.training.schedule
    if options.learning_rate is not None:
        schedule = dataclasses.replace(schedule, learning_rate=options.learning_rate)
    if options.router_bias == "moving" and not schedule.bias_update_speed:
        schedule = dataclasses.replace(schedule, bias_update_speed=moving_bias_speed(Path(source)))
    if not options.mtp:
        schedule = dataclasses.replace(schedule, mtp_weight=0.0, mtp_weight_after=0.0)
    training = dataclasses.replace(training, schedule=schedule)
    if options.steps is not None:
        training = dataclasses.replace(training, steps=options.steps)
    data = dataclasses.replace(base.data, corpus=options.data, **{name: getattr(options, name) for name in _OF_DATA})
    return dataclasses.replace(
        base,
        data=dataclasses.replace(with_absolute_paths(data, base.data), corpus=os.path.abspath(options.data)),
        training=training,
        lora=options.lora,
        teacher=with_absolute_run(options.teacher),
        precision=options.precision,
        mesh=options.mesh,
    )
