"""`dsv3 plan`: tables, JSON, picture, errors of one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsv3_jax.cli.main import main

STEP = ["--target", "h800:2048", "--mesh", "stage=16,data=2,expert=64", "--precision", "fp8", "--batch-size", "15360"]


def test_a_pipelined_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *STEP, "--average", "none", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "Fits" in printed
    assert "--training.ema-decay 0 " in " ".join(printed.split())
    assert (tmp_path / "plan.txt").read_text() == printed
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    values = json.loads((tmp_path / "plan.json").read_text())
    assert values["fits"]


@pytest.mark.parametrize("line", [STEP, ["--preset", "nano", "--target", "h100:4", "--mesh", "fsdp=4"]])
def test_json_adds_up(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *line, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    memory = values["bytes_a_device"]
    names = ("masters", "working_weights", "gathered_weights", "gradients", "moments", "average", "reserved")
    total = sum(memory[name] for name in names) + sum(memory["activations_kept"].values())
    assert total + max(memory["activations_recomputed"], memory["loss"]) == pytest.approx(memory["total"])
    assert memory["average"] == memory["masters"]  # as dsv3 train keeps one by default


def test_without_a_mesh_the_best_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["plan", "--preset", "ablation-16b", "--target", "h100:8", "--json"]
    assert main(line) == 0
    chosen = json.loads(capsys.readouterr().out)
    assert main([*line, "--search", "1"]) == 0
    (best,) = json.loads(capsys.readouterr().out)
    assert chosen["mesh"] == best["mesh"]
    assert chosen["fits"]


def test_what_does_not_fit_is_told_with_knobs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--target", "h800:256", "--mesh", "fsdp=4,expert=64"]) == 0
    printed = capsys.readouterr().out
    assert "Does not fit" in printed
    assert "--training.rematerialisation full" in printed


def test_search_ranks_what_fits_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--preset", "ablation-16b", "--target", "h100:16", "--search", "40", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    fits = [plan["fits"] for plan in found]
    assert fits == sorted(fits, reverse=True)
    pace = [plan["run_time"]["at_the_reports_pace"]["tokens_per_second_per_device"] for plan in found if plan["fits"]]
    assert pace == sorted(pace, reverse=True)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--target h20:8", "h200"),
        ("--target h200:8 --mesh expert=3,fsdp=-1", "expert=3"),
        ("--target h200:8 --mesh experts=8", "expert"),
        ("--preset v3", "preset 'v3'"),
        ("--search 3 --mesh fsdp=8", "--mesh"),
        ("--precission fp8", "--precision"),
        ("--target h200:8 --mesh fsdp=8 --layout report", "experiments/report_run.py"),
        ("--average host", "--average"),
    ],
)
def test_mistakes_are_one_line(line: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *line.split()]) == 2
    message = capsys.readouterr().err
    assert said in message
    assert message.count("\n") == 1


def test_reinforcement_learning_of_671b_on_512_devices(capsys: pytest.CaptureFixture[str]) -> None:
    line = (
        "plan --target h800:512 --mesh fsdp=8,expert=64 --batch-size 512 --sequence-length 4096 --average none --json"
    )
    assert main([*line.split(), "--grpo", "1000"]) == 0
    values = json.loads(capsys.readouterr().out)
    found = values["reinforcement_learning"]
    assert found["policy_bytes_a_device"] == values["bytes_a_device"]["total"]
    assert found["reference_bytes_a_device"] == values["bytes_a_device"]["masters"]
    # 2 sequences on each of 512 ranks; 61 layers keep 512 + 64 numbers of a token in bfloat16.
    assert found["cache_bytes_a_device"] == 2 * 4096 * 61 * (512 + 64) * 2
    assert found["logits_bytes_a_device"] == 2 * 129280 * 4
    parts = ("policy", "reference", "cache", "logits")
    assert found["total_bytes_a_device"] == sum(found[f"{part}_bytes_a_device"] for part in parts)
    assert found["fits"] == (found["total_bytes_a_device"] <= values["target"]["memory_bytes"])
    assert main([*line.split(), "--grpo", "8", "--no-grpo-reference"]) == 0
    assert json.loads(capsys.readouterr().out)["reinforcement_learning"]["reference_bytes_a_device"] == 0
    assert main(["plan", "--target", "h800:512", "--mesh", "fsdp=8,expert=64", "--grpo", "8"]) == 2
    assert "--average none" in capsys.readouterr().err
