"""Checks the experiments that teach a model to work answers out: their table, and each whole with a small model."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dsv3_jax.config import ModelConfig
from dsv3_jax.post_training.tasks import Problem

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports a script of `experiments/` with the import path that running it would have."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if (EXPERIMENTS / f"{name}.py").exists():
            del sys.modules[name]


def test_the_table_has_a_row_for_each_stage_and_a_spread_over_the_seeds(load) -> None:
    reasoning = load("reasoning")
    seeds = [
        {kind: reasoning.Score(accuracy, length, 0.5) for kind in ("all", "sums", "products")}
        for accuracy, length in ((0.25, 10.0), (0.75, 14.0))
    ]
    numbers = reasoning.table({"before": seeds[:1], "after": seeds})
    assert numbers["after"]["sums"]["accuracy"]["mean"] == 0.5
    assert numbers["after"]["all"]["length"]["values"] == [10.0, 14.0]
    lines = reasoning.describe(numbers).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["before", "after"]
    assert "0.25, 10.0, 0.50" in lines[1]
    assert "0.50 ± 0.35, 12.0 ± 2.8, 0.50 ± 0.00" in lines[2]
    assert [reasoning.kind_of(Problem(prompt, "", "")) for prompt in ("1 + 2 * 3 = ", "1 - 2 = ")] == [
        "products",
        "sums",
    ]


@pytest.fixture
def small(load, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Makes the experiments small, and every answer right, since an untrained model has none that could be kept."""
    from dsv3_jax.post_training import rewards

    ablation, first, reasoning = map(load, ("ablation", "r1_zero_small", "reasoning"))
    model = ModelConfig.preset("tiny", vocab_size=266, num_hidden_layers=1, first_k_dense_replace=0)
    monkeypatch.setattr(ablation, "tiny_model", lambda: model)
    monkeypatch.setattr(rewards, "REWARDS", {**rewards.REWARDS, "numeric": lambda *_: 1.0})
    monkeypatch.setattr(first, "TEXTS", 200)
    monkeypatch.setattr(reasoning, "HELD_OUT", 4)
    # Engines of few rows have few programs to compile.
    monkeypatch.setattr("dsv3_jax.runs.reinforcement._MOST_SEQUENCES", 2)
    monkeypatch.setattr("dsv3_jax.cli.sample._PROBLEMS_AT_A_TIME", 1)
    return reasoning


def finished(
    script: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, reasoning: ModuleType
) -> dict[str, Any]:
    """Calls an experiment twice; the second call must train and draw nothing. Returns what it wrote."""
    command = ["--steps", "2", "--seeds", "0", "--out", str(folder / "out"), "--runs", str(folder / "runs")]
    script.main(command)
    written = folder / "out" / f"{script.__name__}.json"
    first = json.loads(written.read_text())
    assert (folder / "out" / f"{script.__name__}.png").read_bytes().startswith(b"\x89PNG")

    def call(*words: object) -> None:
        assert words[0] == "sample"  # which finds that nothing is left to draw

    monkeypatch.setattr(reasoning, "call", call)
    monkeypatch.setattr(reasoning, "Engine", lambda *_: pytest.fail("a finished run was tested again"))
    script.main(command)
    assert json.loads(written.read_text()) == first
    return first


@pytest.mark.slow
def test_distillation(load, small: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = load("distillation")
    monkeypatch.setattr(script, "PROBLEMS", 6)
    found = finished(script, tmp_path, monkeypatch, small)
    assert set(found["arms"]) == {"base", "short", "long", "teacher"}
    folder = tmp_path / "runs" / "distillation-0"
    long, short = (
        [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for name in ("long.jsonl", "short.jsonl")
    )
    assert [each["prompt"] for each in long] == [each["prompt"] for each in short]
    assert all(each["completion"] == f"\\boxed{{{each['answer']}}}" for each in short)


@pytest.mark.slow
def test_the_stages_of_r1(load, small: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = load("sft_then_rl")
    monkeypatch.setattr(script, "PROBLEMS", 6)
    found = finished(script, tmp_path, monkeypatch, small)
    assert list(found["stages"]) == list(script.STAGES)
    starts = {
        stage: json.loads((tmp_path / "runs" / "sft_then_rl-0" / stage / "config.json").read_text())["data"]["corpus"]
        for stage in ("cold-start", "rejection-sampling")
    }
    assert [Path(name).name for name in starts.values()] == ["examples.jsonl", "right.jsonl"]


@pytest.mark.slow
def test_accepted_drafts(load, small: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = load("mtp_acceptance")
    monkeypatch.setattr(script, "ANSWERS", 100)
    monkeypatch.setattr(script, "TEXTS", 2)
    found = finished(script, tmp_path, monkeypatch, small)["acceptance"]
    assert list(found) == list(script.STAGES)
    topic = found["base"]["drawn"]["code"]
    assert len(topic["by_depth"]) == 2
    assert topic["drafts"][0] >= topic["drafts"][1]
    assert topic["positions"][:4] == [0, 1, 2, 4]
