"""Trains until the validation text is predicted well enough, and adds a line to a table of who did so how fast.

    python experiments/speedrun.py                                              # the recipe of the preset nano
    python experiments/speedrun.py --training.batch-size 4 --steps 800          # another recipe: options of dsv3 train
    python experiments/speedrun.py --target 1.60 --training.optimizer muon

A run counts if an evaluation on the default corpus, Python's own source code, gives at most --target bits per byte. The
text is that of the Python in use, so compare lines of one version of Python. The time is that of the training steps up
to this evaluation: the first one's compilation counts, evaluations and the preparation of the data do not. The line
goes into experiments/results/speedrun.md; send it in together with the options that made it.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from dsv3_jax import default_run
from dsv3_jax.errors import UserError
from dsv3_jax.operating_system import processor_name
from dsv3_jax.runs.folder import RunFolder, differences

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "experiments" / "results" / "speedrun.md"
HEAD = """# Speedrun

Time of training until the validation part of the default corpus takes at most the target, in bits per byte. Compare
lines of the same target and the same version of Python, whose source code is the text. Written by
`python experiments/speedrun.py`.

| date | target | reached | time | steps | tokens | precision | hardware | Python | commit | differs from nano |
|---|---|---|---|---|---|---|---|---|---|---|
"""


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run reached.

    Attributes:
      reached: bits per byte of the first evaluation at or below the target, or else of the best one.
      step, tokens: steps and tokens up to that evaluation.
      seconds: duration of those steps.
    """

    reached: float
    step: int
    tokens: int
    seconds: float


def result_of(records: list[dict[str, Any]], target: float) -> Result:
    """Returns the result of a run from the records of its metrics.jsonl.

    Raises:
      UserError: the run was not evaluated after a step.
    """
    evaluations = [(record["step"], record["validation_bits_per_byte"]) for record in records if _is_evaluation(record)]
    if not evaluations:
        raise UserError("the run was not evaluated after any step")
    good = [found for found in evaluations if found[1] <= target]
    step, reached = good[0] if good else min(evaluations, key=lambda found: found[1])
    seconds, tokens = 0.0, 0
    for record in records:
        if "tokens_per_second" in record and record["step"] <= step:
            seconds += (record["tokens"] - tokens) / record["tokens_per_second"]
            tokens = record["tokens"]
    return Result(reached, step, tokens, seconds)


def _is_evaluation(record: dict[str, Any]) -> bool:
    return "validation_bits_per_byte" in record and record["step"] > 0


def line(result: Result, run: RunFolder, target: float) -> str:
    """Returns a line of the table.

    Raises:
      UserError: the run read another corpus than the default one.
    """
    config, usual = run.read_config(), default_run("nano")
    if config.data.corpus != usual.data.corpus:
        raise UserError(f"the corpus must be {usual.data.corpus}, not {config.data.corpus}")
    named = {"preset", "precision", "training.steps", "training.tracker", "training.sample_tokens"}
    changed = [
        f"{name}={now}"
        for name, _, now in differences(usual.to_dict(), config.to_dict())
        if name not in named and not name.startswith("mesh.")
    ]
    cells = [
        datetime.datetime.now(tz=datetime.UTC).date(),
        f"{target:.4f}",
        f"{result.reached:.4f}",
        f"{result.seconds:.0f} s",
        result.step,
        f"{result.tokens:,}",
        config.precision,
        hardware(),
        platform.python_version(),
        commit(),
        ", ".join(changed) or "nothing",
    ]
    return f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |\n"


def hardware() -> str:
    """Returns the name of the accelerators, or that of the CPU with its cores."""
    import jax

    kind, count = jax.devices()[0], jax.device_count()
    if kind.platform != "cpu":
        return f"{count} x {kind.device_kind}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{processor_name()}, {cores} cores"


def commit() -> str:
    """Returns the short hash of the commit, with a plus sign if files differ from it; a dash outside a repository."""
    found = []
    for command in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        try:
            done = subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return "-"
        found.append(done.stdout.strip())
    return found[0] + "+" * bool(found[1])


def main() -> int:
    """Trains, and adds a line to the table if the target is reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=float, default=1.71, help="bits per byte of the validation text to reach")
    parser.add_argument("--table", type=Path, default=TABLE, help="the table that a line is added to")
    parser.add_argument("--out", type=Path, help="folder of the run, which is kept; a temporary one unless given")
    options, recipe = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as temporary:
        run = RunFolder(options.out or Path(temporary) / "run")
        command = [sys.executable, "-m", "dsv3_jax.cli.main", "train", "--preset", "nano", "--out", str(run.path)]
        quiet = ["--training.sample-tokens", "0", "--tracker", "none"]
        given = {word.split("=")[0] for word in recipe}
        for name, value in zip(quiet[::2], quiet[1::2], strict=True):
            command += [] if name in given else [name, value]
        ended = subprocess.run([*command, *recipe], check=False)
        if ended.returncode:
            return ended.returncode
        records = [json.loads(text) for text in run.metrics.read_text().splitlines()]
        result = result_of(records, options.target)
        row = line(result, run, options.target)
    print(HEAD.splitlines()[-2], row, sep="\n", end="")
    if result.reached > options.target:
        print(f"speedrun: {result.reached:.4f} bits per byte do not reach {options.target:.4f}: no line is added")
        return 1
    if not options.table.exists():
        options.table.write_text(HEAD)
    with options.table.open("a") as table:
        table.write(row)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"speedrun: {error}")
