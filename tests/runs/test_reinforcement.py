"""Checks a run of reinforcement learning from its start to its end, and that a killed one repeats bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_runs import assert_trees_equal

from dsv3_jax import train
from dsv3_jax.cli.grpo import main as grpo
from dsv3_jax.errors import UserError
from dsv3_jax.runs.checkpoints import load_run
from dsv3_jax.runs.folder import RunFolder
from dsv3_jax.runs.metrics import read_metrics
from dsv3_jax.runs.policy_updates import PolicyUpdates

OPTIONS = "--steps 3 --prompts 2 --group 4 --max-new-tokens 6 --held-out 4 --checkpoint-every 2 --evaluate-every 2"
REWARD = ["--reward", "digits"]  # of random text, so that rewards differ


@pytest.fixture(autouse=True)
def rewarded_digits(monkeypatch: pytest.MonkeyPatch):
    """Adds a reward that random weights can earn: the share of characters below "@"."""
    from dsv3_jax.post_training import rewards

    def digits(prompt: str, completion: str, answer: str) -> float:
        return sum(letter < "@" for letter in completion) / 6

    monkeypatch.setattr(rewards, "REWARDS", {**rewards.REWARDS, "digits": digits})


def run(source: Path, out: Path, *more: str) -> list[dict[str, Any]]:
    """Calls the command and returns the records without those that tell times."""
    assert grpo([str(source), "--out", str(out), *OPTIONS.split(), *REWARD, *more]) == 0
    return [
        {name: value for name, value in record.items() if "seconds" not in name and "per_second" not in name}
        for record in read_metrics(RunFolder(out).metrics)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        pytest.param(["--objective.kl-weight", "0"], id="plain"),
        pytest.param(
            ["--one-step-behind", "--objective.largest-correction", "2", "--minibatches", "2", "--replay-experts"],
            id="behind",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_killed_run_repeats_bit_for_bit(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    whole = run(source, tmp_path / "whole", *more)
    take = PolicyUpdates.take

    def killed(self: Any, state: Any, rollout: Any, step: int, *args: Any, **options: Any) -> Any:
        if step == 2:
            raise RuntimeError("killed")
        return take(self, state, rollout, step, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(PolicyUpdates, "take", killed)
        with pytest.raises(RuntimeError, match="killed"):
            run(source, tmp_path / "killed", *more)
    assert run(source, tmp_path / "killed", *more) == whole
    ends = [load_run(tmp_path / name) for name in ("whole", "killed")]
    assert_trees_equal(*(end.model for end in ends))
    assert ends[0].saved.position == ends[1].saved.position
    steps = [record for record in whole if "reward" in record]
    assert [record["step"] for record in steps] == [1, 2, 3]
    assert all(record["equal_groups"] < 2 and record["gradient_norm"] > 0 for record in steps)
    if "--replay-experts" in more:
        assert steps[1]["drawn_difference_own_experts"] == pytest.approx(steps[1]["drawn_difference"], abs=0.05)
        assert all("kl" in record for record in steps)
    else:
        assert all(record["drawn_difference"] < 2e-5 for record in steps)  # the engine's weights are the trainer's
    pages = sorted(path.name for path in (tmp_path / "whole" / "samples").iterdir())
    assert pages == ["step-000001.txt", "step-000002.txt", "step-000003.txt"]
    assert "reward" in (tmp_path / "whole" / "samples" / pages[0]).read_text()
    assert json.loads((tmp_path / "whole" / "summary.json").read_text())["steps"] == 3
    assert (tmp_path / "whole" / "reward.png").read_bytes().startswith(b"\x89PNG")
    if not more[0].startswith("--one"):
        _check_refusals(source, tmp_path / "whole")


def _check_refusals(source: Path, out: Path) -> None:
    for change, parts in (
        (["--seed", "7"], ["rollout.seed", "training.seed"]),
        (["--objective.clip-above", "0.3"], ["objective.clip_above = 0.2", "0.3"]),
    ):
        with pytest.raises(UserError) as refusal:
            run(source, out, "--objective.kl-weight", "0", *change)
        assert any(part in str(refusal.value) for part in parts)
    with pytest.raises(UserError, match="dsv3 grpo"):
        train(RunFolder(out).read_config(), out)


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        pytest.param([], "--out is missing", id="no-out"),
        pytest.param(["--out", "x", "--task", "poetry"], "no task or file", id="task"),
        pytest.param(["--out", "x", "--reward", "kindness"], "no reward 'kindness'", id="reward"),
        pytest.param(["--out", "x", "--minibatches", "3"], "must divide prompts", id="minibatches"),
        pytest.param(["--out", "x", "--one-step-behind"], "largest_correction", id="behind"),
        pytest.param(["--out", "x", "--group", "1"], "group must be", id="group"),
        pytest.param(["--out", "x", "--reference-every", "3", "--objective.kl-weight", "0"], "kl_weight", id="kl"),
        pytest.param(["--out", "x", "--mesh.stage", "2"], "stage", id="stage"),
        pytest.param(["--out", "x", "--processes.count", "2"], "processes.coordinator is missing", id="processes"),
        pytest.param(["--out", "x", "--max-new-tokens", "1000"], "context of 128", id="length"),
    ],
)
def test_a_mistake_is_one_line(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str], part: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refusal:
        grpo([str(source), *argv])
    assert part in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "x").exists()


def test_problems_of_a_file_are_shuffled_and_some_held_out(tmp_path: Path) -> None:
    from dsv3_jax.post_training.tasks import ProblemSource

    path = tmp_path / "mine.jsonl"
    rows = [{"prompt": f"{number} = ", "answer": str(number), "reward": "numeric"} for number in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = ProblemSource(str(path), seed=1)
    held_out = {problem.prompt for problem in source.held_out(100)}
    stream = source.training(0)
    first = [next(stream).prompt for _ in range(40 - len(held_out))]
    second = [next(stream).prompt for _ in range(40 - len(held_out))]
    assert held_out
    assert set(first) == set(second) == {row["prompt"] for row in rows} - held_out
    assert first != second
    assert next(source.training(3)).prompt == first[3]
    path.write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(UserError, match="too few problems"):
        ProblemSource(str(path), seed=1)
    assert np.unique([p.prompt for p in ProblemSource("arithmetic", 0).held_out(20)]).size == 20
