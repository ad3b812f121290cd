"""Trains in two processes: where one dies or hangs, the other says so and ends, and the run resumes bit for bit."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from simulated import environment
from small_runs import VOCABULARY, write_corpus

pytestmark = pytest.mark.slow

STEPS = 12
_OPTIONS = {
    "preset": "tiny",
    "steps": STEPS,
    "data.tokenizer": "byte",
    "data.vocab-size": VOCABULARY,
    "data.sequence-length": 32,
    "data.validation-sequences": 4,
    "model.vocab-size": VOCABULARY,
    "model.num-hidden-layers": 1,
    "model.first-k-dense-replace": 0,
    "model.num-nextn-predict-layers": 0,
    "training.ema-decay": 0,
    "training.log-every": 1,
    "training.checkpoint-every": 3,
    "training.sample-tokens": 0,
}


def start(folder: Path, count: int, timeout: int, **options: object) -> list[subprocess.Popen[str]]:
    """Starts `count` processes of one run, with one device each; they connect at a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    values = _OPTIONS | {name.replace("__", "."): value for name, value in options.items()}
    if count > 1:
        values |= {"processes.coordinator": f"127.0.0.1:{port}", "processes.count": count, "processes.timeout": timeout}
    command = [sys.executable, "-m", "dsv3_jax.cli.main", "train", "--out", str(folder / "run")]
    command += ["--data.corpus", str(folder / "corpus"), *(f"--{name}={value}" for name, value in values.items())]
    processes = []
    for index in range(count):
        log = (folder / f"log{index}").open("w")
        own = [f"--processes.index={index}"] if count > 1 else []
        environ = environment(JAX_PLATFORMS="cpu", JAX_COMPILATION_CACHE_DIR=str(folder / "compiled"))
        processes.append(subprocess.Popen([*command, *own], stdout=log, stderr=log, text=True, env=environ))
    return processes


def losses(folder: Path) -> dict[int, float]:
    path = folder / "run" / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def wait_for_step(folder: Path, step: int, processes: list[subprocess.Popen[str]]) -> None:
    until = time.monotonic() + 300
    while max(losses(folder), default=0) < step:
        assert time.monotonic() < until, "no step"
        assert all(process.poll() is None for process in processes), (folder / "log0").read_text()[-2000:]
        time.sleep(0.05)


def last_line(folder: Path, index: int) -> str:
    return (folder / f"log{index}").read_text().strip().splitlines()[-1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("two")
    write_corpus(path / "corpus")
    return path


def wait_for_text(folder: Path, text: str, processes: list[subprocess.Popen[str]]) -> None:
    until = time.monotonic() + 300
    while text not in (folder / "log0").read_text():
        assert time.monotonic() < until, f"no {text!r}"
        assert all(process.poll() is None for process in processes), (folder / "log0").read_text()[-2000:]
        time.sleep(0.05)


def test_a_first_process_that_dies_while_compiling_ends_the_other(folder: Path) -> None:
    """JAX's own service dies with it; JAX would print a page and abort."""
    processes = start(folder, 2, 60, steps=1000)
    wait_for_text(folder, "MaxVio below", processes)  # the last line before it compiles
    processes[0].send_signal(signal.SIGKILL)
    assert processes[1].wait(30) == 4
    lines = [line for line in (folder / "log1").read_text().splitlines() if not line.startswith("[Gloo]")]
    assert len(lines) == 1
    assert re.search("process 1 of 2: (process 0 has died|the connection with process 0 was lost)", lines[0])
    assert "run the same command to start again" in lines[0]


def test_a_peer_that_hangs_is_waited_for_only_so_long_and_the_run_goes_on(folder: Path) -> None:
    """A peer that hangs closes no connection. The steps after the checkpoint are computed twice, with equal results."""
    first = start(folder, 2, 5, steps=1000)
    wait_for_step(folder, 7, first)  # after the second checkpoint has begun, so that the first is whole
    first[1].send_signal(signal.SIGSTOP)
    try:
        assert first[0].wait(60) == 4
    finally:
        first[1].kill()
    assert re.search(r"process 0 of 2: .* for 5 s", last_line(folder, 0))
    assert "run the same command to resume from step" in last_line(folder, 0)
    before = losses(folder)

    second = start(folder, 2, 60, steps=1000)
    wait_for_step(folder, max(before) + 1, second)
    again = losses(folder)
    assert {step: again[step] for step in before} == before
    assert "resuming from step" in (folder / "log0").read_text()

    second[1].send_signal(signal.SIGTERM)  # one gets the signal, and both stop at the same step
    assert [process.wait(90) for process in second] == [143, 143]
    assert "stopped and saved at step" in last_line(folder, 0)
