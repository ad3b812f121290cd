"""Trains a policy by reward in two processes: it learns what it does in one, and both stop and resume together."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from simulated import environment

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent / "simulated_policy_process.py"
OPTIONS = (
    "--group 2 --max-new-tokens 6 --held-out 3 --evaluate-every 2 --checkpoint-every 2 --log-every 1 "
    "--reward digits --replay-experts --objective.kl-weight 0.1"
)
PROBLEMS = ("--prompts", "4", "--minibatches", "2")


def start(source: Path, out: Path, count: int, *more: str) -> list[subprocess.Popen[str]]:
    """Starts `count` processes of one run, with one device each; they connect at a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(SCRIPT), str(source), "--out", str(out), *OPTIONS.split(), *more]
    environ = environment(JAX_PLATFORMS="cpu", JAX_COMPILATION_CACHE_DIR=str(out.parent / "compiled"))
    processes = []
    for index in range(count):
        own = ["--processes.coordinator", f"127.0.0.1:{port}", "--processes.count", "2", "--processes.timeout", "60"]
        own = [*own, "--processes.index", str(index)] if count > 1 else []
        log = out.with_name(f"{out.name}-log{index}").open("a")
        processes.append(subprocess.Popen([*command, *own], stdout=log, stderr=log, text=True, env=environ))
    return processes


def records(out: Path) -> list[dict[str, Any]]:
    path = out / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_two_processes_learn_what_one_does(source: Path, tmp_path: Path) -> None:
    """Each draws half of the completions, by the same weights; the first step's numbers are those of one process."""
    found = {}
    for count in (1, 2):
        out = tmp_path / f"policy-{count}"
        processes = start(source, out, count, "--steps", "2", *PROBLEMS)
        assert [process.wait(240) for process in processes] == [0] * count, out.with_name(
            f"{out.name}-log{count - 1}"
        ).read_text()[-2000:]
        found[count] = records(out)
    alone, together = ({(r["step"], "reward" in r): r for r in found[count]} for count in (1, 2))
    assert alone.keys() == together.keys() == {(0, False), (1, True), (2, True), (2, False)}
    assert together[0, False] == alone[0, False]
    one, two = alone[1, True], together[1, True]
    for name in ("reward", "reward_digits", "length", "cut_share", "equal_groups", "tokens"):
        assert two[name] == one[name]
    for name in ("loss", "entropy", "gradient_norm", "kl", "drawn_difference"):
        assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-6)
    assert one["gradient_norm"] > 0
    assert 0 < one["equal_groups"] + 1 <= 4
    assert together[2, True]["reward"] == pytest.approx(alone[2, True]["reward"], abs=0.3)  # a near draw may differ
    pages = [(tmp_path / f"policy-{count}" / "samples" / "step-000001.txt").read_text() for count in (1, 2)]
    assert pages[0] == pages[1]


def test_both_stop_and_resume_together(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "policy"
    first = start(source, out, 2, "--steps", "1000", *PROBLEMS)
    until = time.monotonic() + 240
    while max((record["step"] for record in records(out)), default=0) < 3:
        assert time.monotonic() < until
        assert all(process.poll() is None for process in first), (tmp_path / "policy-log0").read_text()[-2000:]
        time.sleep(0.05)
    first[1].send_signal(signal.SIGTERM)
    assert [process.wait(90) for process in first] == [143, 143]
    said = (tmp_path / "policy-log0").read_text()
    saved = int(said.split("stopped and saved at step ")[1].split(";")[0])
    assert saved >= 3
    second = start(source, out, 2, "--steps", "1000", *PROBLEMS)
    try:
        until = time.monotonic() + 240
        while f"resuming from step {saved}" not in (tmp_path / "policy-log0").read_text():
            assert time.monotonic() < until
            assert all(process.poll() is None for process in second), (tmp_path / "policy-log0").read_text()[-2000:]
            time.sleep(0.05)
    finally:
        for process in second:
            process.kill()
            process.wait()


def test_problems_are_shared_evenly(source: Path, tmp_path: Path) -> None:
    processes = start(source, tmp_path / "policy", 2, "--steps", "2", "--prompts", "3")
    assert [process.wait(120) for process in processes] == [2, 2]
    assert "prompts (3) must be a multiple of the number of processes (2)" in (tmp_path / "policy-log0").read_text()
    assert not (tmp_path / "policy").exists()
