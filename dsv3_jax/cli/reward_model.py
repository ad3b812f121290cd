"""The command `dsv3 reward-model`: a model that scores answers, trained on preference pairs."""

from __future__ import annotations

import dataclasses

from dsv3_jax.cli.options import parse
from dsv3_jax.cli.tuning import Tuning, TuningOptions, common_defaults, with_common_options
from dsv3_jax.terminal import say
from dsv3_jax.training.config import RunConfig

_DESCRIPTION = """Train a reward model from the model in folder RUN (a run or a published checkpoint).

It learns to give the better answer of each pair the higher score (Bradley and Terry). The share of held-out pairs that
it orders rightly is printed and recorded. If the folder --out already holds the same run, it is resumed. A line of the
data is one of

  {"prompt": "...", "chosen": "...", "rejected": "..."}      the last two may be lists of messages, as may the prompt
  {"chosen": [messages], "rejected": [messages]}

A pair must fit in a row. `dsv3 grpo` and `dsv3 sample` use the result: --reward model:runs/reward

Examples:
  dsv3 reward-model runs/chat --data pairs.jsonl --out runs/reward
  dsv3 reward-model runs/chat --data pairs.jsonl --out runs/reward --epochs 2 --learning-rate 1e-4
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardModelOptions(TuningOptions):
    __doc__ = TuningOptions.__doc__

    epochs: float = 1.0


def main(argv: list[str]) -> int:
    """Trains a reward model and returns the exit code.

    Args:
      argv: the folder of the model, and options.
    """
    from dsv3_jax.runs.fine_tuning import default_reward_model

    return Tuning(
        command="reward-model",
        form="preferences",
        example="runs/reward",
        data="preference pairs, such as --data pairs.jsonl",
        default=default_reward_model,
        parse=_parse,
        configure=lambda base, options, source: with_common_options(base, options),
        say=_describe,
    ).run(argv)


def _parse(flags: list[str], base: RunConfig) -> RewardModelOptions:
    default = RewardModelOptions(**common_defaults(base))
    return parse(flags, prog="dsv3 reward-model RUN", description=_DESCRIPTION, default=default)


def _describe(config: RunConfig) -> None:
    say("reward model: the score of an answer is the logit of token 0 after its last token")
