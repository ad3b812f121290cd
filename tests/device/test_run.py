"""Checks that a failing, hanging or crashing check costs only itself, and runs the real checks in the interpreter."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import pathlib
import sys

import pytest

DEVICE = pathlib.Path(__file__).parents[2] / "experiments" / "device"


@pytest.fixture
def run(monkeypatch):
    monkeypatch.syspath_prepend(str(DEVICE))
    yield importlib.import_module("run")
    for name in ("run", "plan"):
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_every_failure_costs_its_own_case_only(run, tmp_path, monkeypatch):
    check = run.Check("bad", "injected", limit=60, case_limit=1, clusters=True)
    monkeypatch.setenv("PYTHONPATH", str(pathlib.Path(__file__).parent))
    runner = run.Run(tmp_path, limit=100, jobs=2)
    runner.checks([check, run.Check("absent", "no_such_module")])
    outcome = {(r["check"], r["case"]): r for r in runner.results}
    passed = {case for (check, case), r in outcome.items() if check == "bad" and r["passed"]}
    assert passed == {"first", "after the hang", "last"}
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert "stopped after" in outcome["bad", "hang"]["message"]
    noted = next(line for line in lines if line["kind"] == "note")
    assert (noted["check"], noted["case"], noted["compile_s"]) == ("bad", "hang", 1.5)
    assert outcome["bad", "crash"]["message"] == "SIGABRT"
    assert "MemoryError" in outcome["bad", "out of memory"]["message"]
    assert outcome["bad", "killed"]["message"] == "killed"
    assert not outcome["absent", "(start)"]["passed"]
    again = {case for check, case in outcome if check == "bad [no clusters]"}
    assert again >= {"hang", "crash"}
    assert not again & passed
    assert lines[0]["kind"] == "machine"
    assert lines[0]["jax"] == importlib.metadata.version("jax")
    assert [line["case"] for line in lines if line["kind"] == "result"] == [r["case"] for r in runner.results]
    assert "no_such_module" in (tmp_path / "printed.txt").read_text()
    report = run.table(runner.results)
    assert report.splitlines()[-1].startswith("FAIL")


@pytest.mark.slow
def test_checks_and_timings_run_in_the_interpreter(run, tmp_path, capsys):
    """Runs the parent with checks of each kind; the others differ in their cases."""
    only = ["smoke", "quantise float32, powers", "timing, ceilings", "timing, masked"]
    code = run.main(["all", "--interpret", "--jobs", "2", "--out", str(tmp_path), "--only", *only])
    printed = capsys.readouterr().out
    assert not code, printed + (tmp_path / "printed.txt").read_text()
    assert "0 failed" in printed
    assert "masked" in printed


def test_the_training_call_is_planned_for_its_limit(run):
    """FP8 starts first, each case may take nearly all of the 280 seconds of a call, and both run at once."""
    first, second = run.COMMANDS["training"]
    assert [check.arguments["precision"] for check in (first, second)] == ["fp8", "bfloat16"]
    assert min(first.case_limit, second.case_limit) >= 255


@pytest.mark.slow
def test_training_runs_in_a_rehearsal(run, tmp_path):
    words = ["training", "--interpret", "--limit", "500", "--out", str(tmp_path), "--only", "fp8"]
    code = run.main(words)
    assert not code, (tmp_path / "printed.txt").read_text()
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    notes = [line for line in lines if line["kind"] == "note"]
    assert [line["step"] for line in notes if "step" in line] == [0, 1, 2]
    (result,) = (line for line in lines if line["kind"] == "result")
    assert result["passed"]
    assert result["tokens_per_s"] > 0
