"""Checks `dsv3 reward-model`: it learns what is preferred, resumes exactly, and its scores train a policy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from small_runs import assert_trees_equal, final_state

from dsv3_jax.cli.main import main
from dsv3_jax.errors import UserError
from dsv3_jax.runs.folder import RunFolder
from dsv3_jax.runs.metrics import read_metrics
from dsv3_jax.runs.model_rewards import load_reward_model
from dsv3_jax.runs.saved_run import list_checkpoints

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(uninterrupted: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Returns a reward model that prefers answers with a digit, trained by the command line, and the command."""
    folder, random = tmp_path_factory.mktemp("reward"), np.random.default_rng(0)

    def text(digit: bool) -> str:
        letters = random.choice(list("abcdefgh"), 6).tolist()
        return "".join([*letters[:3], str(random.integers(10)) if digit else "x", *letters[3:]])

    pairs = [{"prompt": "say: ", "chosen": text(True), "rejected": text(False)} for _ in range(160)]
    data = folder / "pairs.jsonl"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    command = ["reward-model", str(uninterrupted), "--data", str(data), "--out", str(folder / "run")]
    command += ["--precision", "float32", "--learning-rate", "5e-3", "--epochs", "4", "--validation-fraction", "0.2"]
    command += ["--training.checkpoint-every", "40"]
    assert main(command) == 0
    return folder / "run", command


def test_it_orders_held_out_pairs_rightly(trained: tuple[Path, list[str]]) -> None:
    records = [r for r in read_metrics(RunFolder(trained[0]).metrics) if "validation_accuracy" in r]
    assert records[0]["validation_accuracy"] < 0.8
    assert records[-1]["validation_accuracy"] > 0.9
    assert records[-1]["validation_loss"] < 0.4
    summary = json.loads(RunFolder(trained[0]).summary.read_text(encoding="utf-8"))
    assert summary["validation"]["accuracy"] == records[-1]["validation_accuracy"]
    score = load_reward_model(trained[0])
    better, worse = score([("say: ", "abc7def", ""), ("say: ", "abcxdef", "")])
    assert better > worse


def test_it_resumes_bit_for_bit(trained: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, command = trained
    config = RunFolder(folder).read_config()
    copy = shutil.copytree(folder, tmp_path / "run")
    shutil.rmtree(list_checkpoints(RunFolder(copy))[-1])
    assert main([*command[:5], str(copy), *command[6:]]) == 0
    states = [final_state(path, config, step=config.training.steps)[0] for path in (folder, copy)]
    assert_trees_equal(*states)


def test_it_scores_samples_and_a_policy(trained: tuple[Path, list[str]], uninterrupted: Path, tmp_path: Path) -> None:
    reward, out = f"model:{trained[0]}", tmp_path / "samples.jsonl"
    command = ["sample", str(uninterrupted), "--task", "arithmetic", "--count", "2", "--samples", "2"]
    command += ["--max-new-tokens", "4", "--reward", reward, "--keep", "all", "--out", str(out)]
    assert main(command) == 0
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 4
    scores = load_reward_model(trained[0])([(row["prompt"], row["completion"], "") for row in rows])
    np.testing.assert_allclose([row["reward"] for row in rows], scores, rtol=1e-5)
    command = ["grpo", str(uninterrupted), "--out", str(tmp_path / "policy"), "--reward", f"numeric+0.5*{reward}"]
    command += ["--steps", "2", "--prompts", "2", "--group", "2", "--max-new-tokens", "4", "--held-out", "2"]
    command += ["--precision", "float32", "--operands", "2", "--optimizer", "muon", "--qk-clip", "1e-3"]
    assert main(command) == 0
    records = [r for r in read_metrics(RunFolder(tmp_path / "policy").metrics) if "reward" in r]
    sums = [r["reward_numeric"] + 0.5 * r[f"reward_{reward}"] for r in records]
    assert [r["reward"] for r in records] == pytest.approx(sums, abs=1e-5)
    assert all(r["largest_logit"] > 0 for r in records)


def test_a_run_that_is_no_reward_model_is_refused(uninterrupted: Path) -> None:
    with pytest.raises(UserError, match="holds no reward model"):
        load_reward_model(uninterrupted)


def test_a_policy_judges_itself(uninterrupted: Path, tmp_path: Path) -> None:
    """The reward is a share of two votes; a resumed run asks and votes the same again."""
    (tmp_path / "constitution.txt").write_text("Be kind.\n", encoding="utf-8")
    command = ["grpo", str(uninterrupted), "--reward", "judge:self", "--votes", "2", "--checkpoint-every", "1"]
    command += ["--constitution", str(tmp_path / "constitution.txt"), "--precision", "float32", "--steps", "2"]
    command += ["--prompts", "2", "--group", "2", "--max-new-tokens", "4", "--held-out", "2", "--operands", "2"]
    assert main([*command, "--out", str(tmp_path / "policy")]) == 0
    settings = json.loads(RunFolder(tmp_path / "policy").grpo.read_text(encoding="utf-8"))
    assert settings["rollout"]["judge"] == {"constitution": "Be kind.", "votes": 2}
    records = [r for r in read_metrics(RunFolder(tmp_path / "policy").metrics) if "reward" in r]
    assert all(0 <= r["reward_judge:self"] == r["reward"] <= 1 for r in records)
    copy = shutil.copytree(tmp_path / "policy", tmp_path / "copy")
    shutil.rmtree(list_checkpoints(RunFolder(copy))[-1])
    assert main([*command, "--out", str(copy)]) == 0
    again = [r for r in read_metrics(RunFolder(copy).metrics) if "reward" in r]
    assert [r["loss"] for r in again] == [r["loss"] for r in records]
