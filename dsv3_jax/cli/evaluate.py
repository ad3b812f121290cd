"""`dsv3 eval`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from dsv3_jax.cli.options import parse
from dsv3_jax.errors import UserError

_DESCRIPTION = """Validation loss and bits per byte of a run's newest checkpoint, main and MTP heads.

MTP acceptance is the share of positions where the MTP head's first choice is also what the main head chooses one token
later, which is when greedy self-speculation accepts a draft.

Example:
  dsv3 eval runs/nano
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Options of `dsv3 eval`.

    Attributes:
      json: print the result as JSON.
    """

    json: bool = False


def main(argv: list[str]) -> int:
    """Evaluates the run whose folder is the first argument."""
    positional = [word for word in argv if not word.startswith("-")]
    flags = [word for word in argv if word.startswith("-")]
    options = parse(EvaluateOptions, flags, prog="dsv3 eval RUN", description=_DESCRIPTION, default=EvaluateOptions())
    if len(positional) != 1:
        raise UserError("give one run folder, such as: dsv3 eval runs/nano")
    from dsv3_jax.cli.compilation_cache import keep_compiled_programs
    from dsv3_jax.runs.evaluation import evaluate_run

    keep_compiled_programs()
    step, result = evaluate_run(Path(positional[0]))
    if options.json:
        import json

        print(json.dumps({"step": step, **dataclasses.asdict(result)}))
        return 0
    print(f"step {step}: {result.describe()}")
    print(f"the same text: {result.text_entropy:.4f} bits per byte by byte frequencies, {result.text_gzip:.4f} by gzip")
    return 0
