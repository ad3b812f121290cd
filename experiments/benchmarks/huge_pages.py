"""Measures how much faster `dsv3 train` is on a CPU because it asks Linux for huge pages.

    python experiments/benchmarks/huge_pages.py [--presets nano mini] [--rounds 3]

Runs with and without them alternate. The results are the median tokens per second of every run, and how many times as
fast the runs with huge pages are, by the medians over the rounds. They are written to
`experiments/results/huge_pages.json` after every round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from dsv3_jax.operating_system import processor_name

RESULTS = Path(__file__).parents[1] / "results" / "huge_pages.json"
STEPS = {"nano": 60, "mini": 8}
PRECISIONS = ("bfloat16", "float32")


def tokens_per_second(preset: str, precision: str, huge: bool) -> float:
    """Returns the median over the steps of a short run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "dsv3_jax.cli.main", "train", "--preset", preset, "--out", folder + "/run"]
        command += ["--precision", precision, "--steps", str(STEPS[preset]), "--training.sample-tokens", "0"]
        variables = os.environ | {"GLIBC_TUNABLES": f"glibc.malloc.hugetlb={int(huge)}"}
        subprocess.run(command, env=variables, check=True, stdout=subprocess.DEVNULL)
        rows = [json.loads(row) for row in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    return statistics.median(row["tokens_per_second"] for row in rows if "tokens_per_second" in row)


def main() -> None:
    """Measures all recipes and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", choices=list(STEPS), default=list(STEPS), help="sizes of the model")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind")
    options = parser.parse_args()
    recipes = [(preset, precision) for preset in options.presets for precision in PRECISIONS]
    found: dict[tuple[str, str], dict[bool, list[float]]] = {recipe: {False: [], True: []} for recipe in recipes}
    for finished in range(1, options.rounds + 1):
        for recipe in recipes:
            for huge in (False, True):
                found[recipe][huge].append(tokens_per_second(*recipe, huge))
                print(*recipe, "huge pages" if huge else "small pages", round(found[recipe][huge][-1]), flush=True)
        write(found, finished)


def write(found: dict[tuple[str, str], dict[bool, list[float]]], rounds: int) -> None:
    """Writes and prints the results of the rounds so far: by recipe, tokens per second without and with huge pages."""
    rows = []
    for (preset, precision), values in found.items():
        small, huge = (statistics.median(values[kind]) for kind in (False, True))
        rows.append(
            {
                "preset": preset,
                "precision": precision,
                "tokens_per_second": {"small_pages": values[False], "huge_pages": values[True]},
                "times_as_fast": huge / small,
            }
        )
        print(f"{preset}, {precision}: {small:,.0f} and {huge:,.0f} tokens/s, {huge / small:.2f} times as fast")
    cores = {"processor": processor_name(), "threads": len(os.sched_getaffinity(0))}
    machine = cores | {"python": platform.python_version(), "jax": version("jax")}
    RESULTS.write_text(json.dumps({**machine, "rounds": rounds, "runs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
