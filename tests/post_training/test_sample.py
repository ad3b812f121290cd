"""Checks rejection sampling with a random model: what is drawn and kept, and that an interruption loses nothing."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from small_models import small_model

from dsv3_jax.cli.main import main
from dsv3_jax.config import ModelConfig
from dsv3_jax.data import Tokenizer
from dsv3_jax.data.tokenizer_training import byte_tokenizer
from dsv3_jax.inference import Engine, EngineConfig
from dsv3_jax.post_training.rejection import Completion, SamplingConfig, keep, sample
from dsv3_jax.post_training.tasks import generate_problems


def completion(text: str, tokens: int, reward: float) -> Completion:
    return Completion(text, (1,) * tokens, (), (), False, {"reward": reward})


@pytest.mark.parametrize(("rule", "kept"), [("shortest-right", ["c"]), ("best", ["b"]), ("all", ["a", "b", "c", "d"])])
def test_what_is_kept(rule, kept: list[str]) -> None:
    drawn = [completion("a", 1, 0.5), completion("b", 9, 1.1), completion("c", 3, 1.0), completion("d", 9, 1.0)]
    assert [one.text for one in keep(drawn, rule, 1.0)] == kept
    assert keep(drawn[:1], rule, 1.0) == ([drawn[0]] if rule == "all" else [])


@pytest.fixture(scope="module")
def run():
    tokenizer = Tokenizer(byte_tokenizer(), "the test's tokenizer")
    config = ModelConfig.preset("tiny", vocab_size=tokenizer.vocab_size, initializer_range=0.2)
    return small_model(config, 1), tokenizer


@pytest.mark.slow
def test_draws_depend_on_seed_prompt_and_number_alone(run) -> None:
    model, tokenizer = run
    engine = Engine(model, EngineConfig(max_sequences=4, compile_at_start=False))
    problems = list(itertools.islice(generate_problems("arithmetic", "train", 0), 3))
    config = SamplingConfig(samples=3, max_new_tokens=6)
    together = {
        problem.prompt: [c.text for c in drawn] for problem, drawn in sample(engine, tokenizer, problems, config)
    }
    ((problem, alone),) = sample(engine, tokenizer, problems[1:2], config)
    assert [c.text for c in alone] == together[problem.prompt]
    assert len(set(together[problem.prompt])) == 3
    assert all(0 <= c.scores["numeric"] <= 1 and len(c.ids) <= 6 for c in alone)


@pytest.mark.slow
def test_the_command_goes_on_where_it_was(run, monkeypatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setattr("dsv3_jax.runs.checkpoints.load_checkpoint", lambda folder, **which: (*run, 7))
    out = tmp_path / "kept.jsonl"
    line = ["sample", "somewhere", "--task", "arithmetic", "--samples", "2", "--max-new-tokens", "3", "--keep", "all"]
    assert main([*line, "--count", "2", "--out", str(out)]) == 0
    first = out.read_text(encoding="utf-8")
    assert len(first.splitlines()) == 4
    out.write_text(first + '{"prompt": "cut o', encoding="utf-8")
    assert main([*line, "--count", "3", "--out", str(out)]) == 0
    lines = out.read_text(encoding="utf-8").splitlines()
    assert lines[:4] == first.splitlines()
    assert len({json.loads(each)["prompt"] for each in lines[:4] + lines[5:]}) == 3
    assert main([*line, "--count", "3", "--out", str(out)]) == 0  # nothing is left
    assert out.read_text(encoding="utf-8").splitlines() == lines
    assert "3 problems are there already; 0 are left" in capsys.readouterr().err
    rejected = tmp_path / "rejected.jsonl"
    line[line.index("all")] = "best"
    assert main([*line, "--count", "1", "--least", "2", "--out", str(rejected)]) == 0
    assert "rejected" in json.loads(rejected.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--reward", "nothing"], "there is no reward 'nothing'"),
        (["--samples", "0"], "--samples"),
        (["--out", "/nowhere/x.jsonl"], "must be a file in a folder that exists"),
        (["--problems", "none.jsonl"], "not allowed with"),
    ],
)
def test_mistakes_are_one_line(changes: list[str], said: str, tmp_path: Path, capsys) -> None:
    out = [] if "--out" in changes else ["--out", str(tmp_path / "x.jsonl")]
    line = ["sample", "somewhere", "--task", "arithmetic", *out, *changes]
    assert main(line) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1
