"""The command `dsv3 eval`."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Literal

from dsv3_jax.bounds import check_bounds
from dsv3_jax.cli.options import notes, parse
from dsv3_jax.errors import UserError

_DESCRIPTION = """Evaluate the newest checkpoint of the run in folder RUN on its validation set.

Prints the loss (nats per token) and the bits per byte of the main head and the MTP head, and the fraction of MTP drafts
that are accepted: the positions where the MTP head's most likely token is also the main head's, one token later.

Examples:
  dsv3 eval runs/nano
  dsv3 eval runs/nano --corpus ~/other-texts
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """The options of `dsv3 eval`.

    Attributes:
      corpus: a file or folder of texts to evaluate on, of which the run's fraction is held out; the run's own corpus if
        not given.
      step: step of the checkpoint; the newest if not given.
      dtype: dtype of the weights in memory; bfloat16 takes half of the memory.
      json: print the result as JSON.
    """

    corpus: str | None = None
    step: int | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    json: bool = False

    def __post_init__(self) -> None:
        if self.step is not None:
            check_bounds(self, {"step": (0, 10**18)}, "--")


def main(argv: list[str]) -> int:
    """Evaluates a run and returns the exit code.

    Args:
      argv: the run's folder, and options.
    """
    positional, flags = _divided(argv)
    options = parse(flags, prog="dsv3 eval RUN", description=_DESCRIPTION, default=EvaluateOptions())
    if len(positional) != 1:
        raise UserError("give one run folder, such as: dsv3 eval runs/nano")
    from dsv3_jax.cli.compilation_cache import keep_compiled_programs
    from dsv3_jax.runs.evaluation import evaluate_run

    keep_compiled_programs()
    with notes():
        step, result = evaluate_run(Path(positional[0]), options.corpus, step=options.step, dtype=options.dtype)
    if options.json:
        import json

        print(json.dumps({"step": step, **dataclasses.asdict(result)}))
        return 0
    print(f"step {step}: {result.describe()}")
    print(result.describe_baselines())
    return 0


def _divided(argv: list[str]) -> tuple[list[str], list[str]]:
    """Returns the words that are no options, and the options with their values."""
    positional, flags = [], []
    words = iter(argv)
    for word in words:
        if not word.startswith("-"):
            positional.append(word)
        else:
            flags += [word, *itertools.islice(words, 1 if word in ("--corpus", "--step", "--dtype") else 0)]
    return positional, flags
