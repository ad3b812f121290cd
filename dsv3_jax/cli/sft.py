"""The command `dsv3 sft`: supervised fine-tuning."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from dsv3_jax.cli.options import parse
from dsv3_jax.cli.run_options import with_absolute_run
from dsv3_jax.cli.tuning import Tuning, TuningOptions, common_defaults, with_common_options
from dsv3_jax.data.config import LossOn
from dsv3_jax.terminal import say
from dsv3_jax.training.config import LoraConfig, RunConfig, TeacherConfig

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
_OF_DATA = ("loss_on", "drop_without_target")
"""Options that are fields of `DataConfig`, beside the common ones."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftOptions(TuningOptions):
    """The options of `dsv3 sft`, beside the common ones.

    Attributes:
      router_bias: whether the biases that balance the experts stay as they are ("frozen") or go on "moving".
      mtp: train the multi-token prediction modules too.
      loss_on: which tokens the model learns to write: the "assistant"'s, those of its "last" turn, or "all".
      drop_without_target: leave out conversations in which there is nothing to learn to write.
    """

    router_bias: Literal["frozen", "moving"] = "frozen"
    mtp: bool = True
    loss_on: LossOn = "assistant"
    drop_without_target: bool = False
    lora: LoraConfig
    teacher: TeacherConfig


def main(argv: list[str]) -> int:
    """Fine-tunes a model and returns the exit code.

    Args:
      argv: the folder of the model, and options.
    """
    from dsv3_jax.runs.fine_tuning import default_fine_tuning, describe_fine_tuning

    return Tuning(
        command="sft",
        form="conversations",
        example="runs/chat",
        data="conversations, such as --data chats.jsonl",
        default=default_fine_tuning,
        parse=_parse,
        configure=_configured,
        say=lambda config: say(describe_fine_tuning(config)),
    ).run(argv)


def _parse(flags: list[str], base: RunConfig) -> SftOptions:
    """Returns the options; those that `flags` does not give are as in `base`."""
    schedule = base.training.schedule
    default = SftOptions(
        **common_defaults(base),
        router_bias="moving" if schedule.bias_update_speed else "frozen",
        mtp=schedule.mtp_weight > 0,
        lora=base.lora,
        teacher=base.teacher,
        **{name: getattr(base.data, name) for name in _OF_DATA},
    )
    return parse(flags, prog="dsv3 sft RUN", description=_DESCRIPTION, default=default)


def _configured(base: RunConfig, options: SftOptions, source: Path) -> RunConfig:
    """Returns the run that the options ask for."""
    from dsv3_jax.runs.fine_tuning import moving_bias_speed

    run = with_common_options(base, options)
    schedule = run.training.schedule
    if options.router_bias == "moving" and not schedule.bias_update_speed:
        schedule = dataclasses.replace(schedule, bias_update_speed=moving_bias_speed(source))
    if not options.mtp:
        schedule = dataclasses.replace(schedule, mtp_weight=0.0, mtp_weight_after=0.0)
    return dataclasses.replace(
        run,
        data=dataclasses.replace(run.data, **{name: getattr(options, name) for name in _OF_DATA}),
        training=dataclasses.replace(run.training, schedule=schedule),
        lora=options.lora,
        teacher=with_absolute_run(options.teacher),
    )
