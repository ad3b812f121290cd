"""Kills runs, damages their files and mistreats their processes at random, and counts what was answered wrongly.

Promised is: nothing saved is lost, a resumed run ends bit for bit as one that was never interrupted, no damaged file is
used, and whatever is wrong is answered by one line and an exit code within the time that was set. Trials are drawn from
a seed, so that a failure can be repeated; the kinds of trial can be chosen by giving the others a count of 0. Figures
are written after every trial, and a call with the same seed goes on from those: only trials that failed are repeated.

    python experiments/soak.py                           hours: the counts that the project promises
    python experiments/soak.py --kills 20 --damages 60 --folders 60 --faults 2 --disks 6 --signals 6
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from command_line import CommandLine, whole_number
from soak_trials import damage_and_load, damaged_checkpoints, import_malformed, published_model, reference_parameters

RESULTS = Path(__file__).parent / "results" / "soak.json"
ROOT = Path(__file__).resolve().parents[1]
STEPS, TIMEOUT = 24, 10
TIMED = ("tokens_per_second", "mfu")
OPTIONS = {
    "preset": "tiny",
    "steps": STEPS,
    "data.tokenizer": "byte",
    "data.vocab-size": 266,
    "data.sequence-length": 32,
    "data.validation-sequences": 4,
    "model.vocab-size": 266,
    "model.num-hidden-layers": 1,
    "model.first-k-dense-replace": 0,
    "model.num-nextn-predict-layers": 0,
    "training.log-every": 1,
    "training.evaluate-every": 3,
    "training.checkpoint-every": 3,
    "training.sample-tokens": 8,
}
# What a process of two prints when it compiles, and when it takes steps.
PHASES = {"connecting": "", "compiling": "MaxVio below", "stepping": "step 4/"}


@dataclasses.dataclass
class Bench:
    """Where trials run: a folder of their own, with a corpus and a cache of compiled programs."""

    folder: Path
    random: random.Random

    def start(self, out: Path, log: Path, **options: Any) -> subprocess.Popen[bytes]:
        """Starts `dsv3 train`; what it prints goes to `log`.out and `log`.err."""
        values = OPTIONS | {"data.corpus": self.folder / "corpus", "out": out} | options
        command = [sys.executable, "-m", "dsv3_jax.cli.main", "train", *(f"--{n}={v}" for n, v in values.items())]
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            # Only process 0 writes the cache, so that process 1 compiles in every trial: without optimisations, for
            # a third of the time.
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        }
        with log.with_suffix(".out").open("wb") as said, log.with_suffix(".err").open("wb") as errors:
            return subprocess.Popen(command, stdout=said, stderr=errors, env=environment)

    def new(self, name: str) -> Path:
        """Returns the path of a new folder."""
        return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.folder))


def error_lines(log: Path) -> list[str]:
    """Returns what a process printed to stderr, without what Gloo says when it connects."""
    lines = log.with_suffix(".err").read_text(errors="replace").splitlines()
    return [line for line in lines if not line.startswith("[Gloo]")]


def records(run: Path) -> list[dict[str, Any]]:
    """Returns the numbers of a run's metrics that two equal runs share."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{n: v for n, v in json.loads(line).items() if n not in TIMED} for line in lines]


def finish(bench: Bench, out: Path, log: Path) -> str:
    """Runs to the end; returns what is wrong with that."""
    code = bench.start(out, log).wait()
    return "" if code == 0 and not error_lines(log) else f"exit code {code}: {error_lines(log)[:2]}"


def kill_and_resume(bench: Bench, reference: Path, good: dict[int, str], seconds: float) -> str:
    """Kills a run up to three times, resumes it, and compares it with one that was not interrupted."""
    folder = bench.new("kill")
    for _ in range(bench.random.randint(1, 3)):
        process = bench.start(folder / "run", folder / "log")
        time.sleep(bench.random.uniform(0.0, seconds))
        process.send_signal(bench.random.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
        if (code := process.wait()) not in (0, -signal.SIGKILL, 128 + signal.SIGTERM, -signal.SIGTERM):
            return f"exit code {code}: {error_lines(folder / 'log')[:2]}"
    if wrong := finish(bench, folder / "run", folder / "log"):
        return wrong
    if records(folder / "run") != records(reference):
        return "the records differ"
    if reference_parameters(folder / "run")[STEPS] != good[STEPS]:
        return "the parameters differ"
    summaries = [json.loads((run / "summary.json").read_text()) for run in (folder / "run", reference)]
    shutil.rmtree(folder)
    return "" if summaries[0] == summaries[1] else "the summaries differ"


def signal_in_setup(bench: Bench, seconds: float) -> str:
    """Sends one or two signals before the first step; the process ends at once."""
    folder, twice = bench.new("signal"), bench.random.random() < 0.5
    process = bench.start(folder / "run", folder / "log")
    time.sleep(bench.random.uniform(0.4, seconds))
    number = bench.random.choice([signal.SIGTERM, signal.SIGINT])
    began = time.monotonic()
    process.send_signal(number)
    if twice:
        time.sleep(bench.random.uniform(0.0, 0.05))
        process.send_signal(number)
    code, lines = process.wait(), error_lines(folder / "log")
    took = time.monotonic() - began
    shutil.rmtree(folder)
    # A second signal can reach a process that has already said its line and is ending: then the system ends it, which
    # shells report as 128 + number too.
    right = code in (0, 128 + number, *((-number,) if twice else ())) and len(lines) <= 1 and took < 6
    return "" if right else f"{number.name}: exit code {code} after {took:.1f} s: {lines[:2]}"


def fill_disk(bench: Bench) -> str:
    """Trains on a disk that becomes full at some point, then evaluates what was saved."""
    disk = bench.new("disk")
    size = f"{round(10 ** bench.random.uniform(1.0, 3.5))}k"
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], check=True)
    log = bench.new("full") / "log"
    try:
        code, lines = bench.start(disk / "run", log).wait(), error_lines(log)
        if (code, len(lines)) not in ((2, 1), (0, 0)):
            return f"{size}: exit code {code}, {len(lines)} lines: {lines[:2]}"
        if code and "space" not in lines[0]:
            return f"{size}: {lines[0]}"
        damaged = damaged_checkpoints(disk / "run")
        return f"{size}: {damaged}" if damaged else ""
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def process_faults() -> dict[str, Callable[[Bench], str]]:
    """Returns what is done to one of two processes, by name."""
    faults: dict[str, Callable[[Bench], str]] = {
        "process 0 absent": lambda bench: _two(bench, absent=0),
        "process 1 absent": lambda bench: _two(bench, absent=1),
        "another port": lambda bench: _two(bench, other={"processes.coordinator": "127.0.0.1:9"}),
        "one index twice": lambda bench: _two(bench, other={"processes.index": 0}),
        "another count": lambda bench: _two(bench, other={"processes.count": 3}),
        "another learning rate": lambda bench: _two(bench, other={"training.schedule.learning-rate": 0.01}),
    }
    for phase in PHASES:
        for name in ("SIGKILL", "SIGSTOP", "SIGTERM"):
            for index in (0, 1):
                faults[f"{name} to process {index} while {phase}"] = lambda bench, given=(phase, name, index): _two(
                    bench, phase=given[0], sent=signal.Signals[given[1]], to=given[2]
                )
    return faults


def _two(
    bench: Bench,
    *,
    absent: int = -1,
    other: dict[str, Any] | None = None,
    phase: str = "",
    sent: signal.Signals | None = None,
    to: int = 0,
) -> str:
    """Starts two processes, does something to one, and checks how the rest of them ends."""
    folder = bench.new("two")
    common = {
        "steps": 1000,
        "processes.coordinator": f"127.0.0.1:{bench.random.randint(20_000, 60_000)}",
        "processes.count": 2,
        "processes.timeout": TIMEOUT,
    }
    processes = {}
    for index in {0, 1} - {absent}:
        own = common | {"processes.index": index} | (other or {} if index == 1 else {})
        processes[index] = bench.start(folder / "run", folder / f"log{index}", **own)
    if sent is not None:
        until = time.monotonic() + 300
        while PHASES[phase] not in (folder / "log0.out").read_text() and time.monotonic() < until:
            time.sleep(0.02)
        time.sleep(bench.random.uniform(0.0, 1.5))
        processes[to].send_signal(sent)
    began, wrong = time.monotonic(), ""
    lost = processes.pop(to) if sent in (signal.SIGKILL, signal.SIGSTOP) else None
    for index, process in processes.items():
        try:
            code = process.wait(TIMEOUT + 30)
        except subprocess.TimeoutExpired:
            wrong = wrong or f"process {index} is there after {TIMEOUT + 30} s"
            process.kill()
            continue
        lines = error_lines(folder / f"log{index}")
        if code not in (2, 4, 130, 143, *((-signal.SIGTERM,) if sent else ())) or len(lines) > 1:
            wrong = wrong or f"process {index}: exit code {code} after {time.monotonic() - began:.0f} s: {lines[:3]}"
    if lost is not None:
        lost.kill()
        lost.wait()
    if not wrong:
        shutil.rmtree(folder)
    return wrong


def write_corpus(folder: Path) -> None:
    """Writes texts from a fixed seed."""
    folder.mkdir()
    drawn = random.Random(0)
    for number in range(24):
        words = drawn.choices(["alpha", "beta", "gamma", "return", "import", "yield", "é", "数"], k=60)
        (folder / f"text{number:02d}.txt").write_text(f"{number}: {' '.join(words)}\n", encoding="utf-8")


def earlier_results(file: Path, seed: int) -> dict[str, dict[str, Any]]:
    """Returns the figures that an earlier call with the same seed wrote to a file."""
    if not file.exists():
        return {}
    earlier = json.loads(file.read_text())
    return earlier["found"] if earlier["seed"] == seed else {}


def main() -> None:
    parser = CommandLine(__doc__)
    for name, count, what in (
        ("kills", 200, "runs killed and resumed"),
        ("damages", 600, "damages of a run's checkpoints"),
        ("folders", 600, "malformed folders of a published model"),
        ("faults", 20, "trials of each fault of a process"),
        ("disks", 60, "disks that become full (needs the right to mount)"),
        ("signals", 60, "signals before the first step"),
    ):
        parser.add_argument(f"--{name}", type=whole_number(0), default=count, help=f"{what} (default: {count})")
    parser.add_argument("--jobs", type=whole_number(1), default=1, help="processes tried at the same time (default: 1)")
    parser.add_argument("--only", default="", help="only faults of a process whose names contain this")
    parser.add_argument("--seed", type=whole_number(0), default=0, help="seed of all trials (default: 0)")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"file of the figures (default: {RESULTS.name})")
    options = parser.parse_args()
    found = earlier_results(options.out, options.seed)

    def trials(name: str, count: int, trial: Callable[[Bench], str], jobs: int = options.jobs) -> None:
        done = found.setdefault(name, {"trials": 0, "failures": {}})
        began, failures = time.monotonic(), done["failures"]
        left = [*map(int, failures), *range(done["trials"], count)]
        benches = [Bench(bench.folder, random.Random(f"{options.seed} {name} {number}")) for number in left]
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            # Trials inside this process have it for themselves: they set its alarm and its standard output.
            for number, wrong in zip(left, pool.map(trial, benches) if jobs > 1 else map(trial, benches), strict=True):
                failures.pop(str(number), None)
                if wrong:
                    print(f"{name}, trial {number}: {wrong}", flush=True)
                    failures[str(number)] = wrong
                done["trials"] = max(done["trials"], number + 1)
                options.out.write_text(json.dumps({"seed": options.seed, "found": found}, indent=1) + "\n")
        if left:
            print(f"{name}: {len(failures)} of {count} failed, {time.monotonic() - began:.0f} s", flush=True)

    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        bench = Bench(Path(folder), random.Random(options.seed))
        write_corpus(bench.folder / "corpus")
        reference = bench.folder / "reference"
        for out in (bench.folder / "warm", reference):  # the first run compiles
            began = time.monotonic()
            if wrong := finish(bench, out, bench.folder / "log"):
                sys.exit(f"a run that nothing happens to fails: {wrong}")
            seconds = time.monotonic() - began
        good = reference_parameters(reference)
        trials("kills", options.kills, lambda bench: kill_and_resume(bench, reference, good, seconds))
        trials(
            "damages",
            options.damages,
            lambda bench: damage_and_load(reference, good, bench.new("damage"), bench.random),
            jobs=1,
        )
        if options.folders:
            model = published_model(reference, bench.folder / "published")
            trials(
                "malformed folders",
                options.folders,
                lambda bench: import_malformed(model, bench.new("x"), bench.random),
                jobs=1,
            )
        trials("signals", options.signals, lambda bench: signal_in_setup(bench, 0.7 * seconds))
        trials("full disks", options.disks, fill_disk)
        for name, fault in process_faults().items():
            if options.only in name:
                trials(name, options.faults, fault)
    failed = sum(len(result["failures"]) for result in found.values())
    print(f"{failed} of {sum(result['trials'] for result in found.values())} trials failed; figures in {options.out}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
