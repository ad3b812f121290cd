"""Checks that `dsv3 train` and `dsv3 eval` answer every mistake with one line and exit code 2, and write nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from refusals import refused
from small_runs import small_run, write_corpus

from dsv3_jax.cli.main import main
from dsv3_jax.data import Tokenizer
from dsv3_jax.data.tokenizer_training import byte_tokenizer, train_bpe
from dsv3_jax.model_presets import presets
from dsv3_jax.runs.folder import RunFolder
from dsv3_jax.runs.starting_point import compare_tokenizers


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["tain"], ["'tain'", "train"]),
        (["train", "--preset", "nnao", "--out", "x"], ["'nnao'", "nano"]),
        (["train"], ["--out"]),
        (["train", "--preset", "nano"], ["--out"]),
        (["train", "--out"], ["--out"]),
        (["train", "--preset", "tiny", "--out", "x", "--stesp", "3"], ["--stesp", "--steps"]),
        (["train", "--preset", "tiny", "--out", "x", "--lr", "3"], ["--lr", "--training.schedule.learning-rate"]),
        (
            ["train", "--preset", "tiny", "--out", "x", "--learningrate", "3"],
            ["mean --training.schedule.learning-rate?"],
        ),
        (["train", "--preset", "tiny", "--out", "x", "--batchsize", "3"], ["mean --training.batch-size?"]),
        (["train", "--preset", "tiny", "--out", "x", "--corpus", "y"], ["--corpus", "--data.corpus"]),
        (["train", "--preset", "tiny", "--out", "x", "--batch-sise", "3"], ["--training.batch-size"]),
        (["train", "--preset", "tiny", "--out", "x", "--steps", "0"], ["training.steps", "not 0"]),
        (["train", "--preset", "tiny", "--out", "x", "--steps", "many"], ["steps", "many"]),
        (["train", "--preset", "tiny", "--out", "x", "--steps", "-1"], ["steps", "-1"]),
        (["train", "--preset", "tiny", "--out", "x", "--precision", "int1"], ["int1"]),
        (["train", "--preset", "tiny", "--out", "x", "--model.hiden-size", "64"], ["--model.hiden-size"]),
        (["train", "--preset", "tiny", "--out", "x", "--model.hidden-size", "-64"], ["hidden_size", "-64"]),
        (["train", "--preset", "tiny", "--out", "x", "--model.n-group", "3"], ["n_routed_experts", "n_group"]),
        (["train", "--preset", "tiny", "--out", "x", "--model.scoring-func", "tanh"], ["scoring-func", "tanh"]),
        (["train", "--preset", "tiny", "--out", "x", "--data.sequence-length", "999"], ["data.sequence_length"]),
        (["train", "--preset", "tiny", "--out", "x", "--training.batch-size", "0"], ["training.batch_size"]),
        (["train", "--preset", "tiny", "--out", "x", "--training.schedule.mtp-weight", "-1"], ["mtp_weight"]),
        (["train", "--preset", "tiny", "--out", "x", "--mesh.stage", "2", "--mesh.context", "2"], ["stage", "context"]),
        (["train", "--preset", "tiny", "--out", "x", "stray"], ["stray"]),
        (["eval"], ["run folder"]),
        (["eval", "nowhere"], ["nowhere", "no run"]),
        (["eval", "a", "b"], ["one run folder"]),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str],
    named: list[str],
    capsys: pytest.CaptureFixture[str],
    no_training: list,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    line = refused(capsys, *words)
    for part in named:
        assert part in line
    assert not no_training
    assert not list(tmp_path.iterdir()), "nothing was written"


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({}, "is empty"),
        ({"a.txt": b""}, "is empty"),
        ({"a.txt": b"ok", "b.txt": b"\xff\xfe\xfa"}, "b.txt is not UTF-8"),
        ({"a.txt": b"small"}, "too small"),
    ],
)
def test_a_corpus_that_cannot_be_used_is_one_line(
    content: dict[str, bytes], named: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name, data in content.items():
        (corpus / name).write_bytes(data)
    out = tmp_path / "run"
    words = ["--preset", "tiny", "--out", str(out), "--data.corpus", str(corpus), "--data.tokenizer", "byte"]
    assert main(["train", *words, "--model.vocab-size", "266", "--data.vocab-size", "266"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(corpus) in error
    assert named in error
    assert not out.exists()


def test_a_missing_corpus_and_tokenizer_are_named(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    words = ["train", "--preset", "tiny", "--out", str(tmp_path / "run")]
    assert "/no/where" in refused(capsys, *words, "--data.corpus", "/no/where")
    corpus = write_corpus(tmp_path / "corpus")
    assert main([*words, "--data.corpus", str(corpus), "--data.tokenizer", "/no/tokenizer.json"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "/no/tokenizer.json" in error


def test_a_tokenizer_larger_than_the_vocabulary_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """The tiny preset's vocabulary of 256 is too small for the byte tokenizer's 266 tokens."""
    corpus = write_corpus(tmp_path / "corpus")
    words = ["--preset", "tiny", "--out", str(tmp_path / "run"), "--data.corpus", str(corpus)]
    assert main(["train", *words, "--model.vocab-size", "260", "--data.tokenizer", "byte"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "266" in error
    assert "260" in error
    assert not (tmp_path / "run").exists()


def test_an_output_folder_that_cannot_be_written_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    (tmp_path / "file").write_text("")
    line = refused(capsys, "train", "--preset", "tiny", "--out", str(tmp_path / "file" / "run"))
    assert "cannot be written" in line


def test_a_folder_with_another_run_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    RunFolder(tmp_path).write_config(small_run("elsewhere"))
    line = refused(capsys, "train", "--preset", "nano", "--out", str(tmp_path))
    assert "tiny" in line
    line = refused(capsys, "train", "--out", str(tmp_path), "--training.batch-size", "8")
    assert "training.batch_size = 4, not 8" in line


def test_options_reach_the_run(no_training: list, tmp_path: Path):
    words = ["--steps", "7", "--model.n-routed-experts=16", "--data.fill_in_middle_rate", "0.5"]
    words += ["--training.ema-decay", "0.5"]
    assert main(["train", "--preset", "tiny", "--out", str(tmp_path), *words]) == 0
    config, out = no_training[0]
    assert out == tmp_path
    assert config.preset == "tiny"
    assert (config.training.steps, config.training.ema_decay) == (7, 0.5)
    assert (config.model.n_routed_experts, config.data.fill_in_middle_rate) == (16, 0.5)


def test_a_resumed_run_keeps_its_own_options(no_training: list, tmp_path: Path):
    config = small_run("elsewhere")
    RunFolder(tmp_path).write_config(config)
    assert main(["train", "--preset", "tiny", "--out", str(tmp_path), "--training.log-every", "5"]) == 0
    assert no_training[0][0].model == config.model
    assert no_training[0][0].data == config.data
    assert no_training[0][0].training.log_every == 5


def test_paths_are_right_in_any_folder(no_training: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    words = ["train", "--preset", "tiny", "--out", "run", "--data.corpus", "text", "--data.tokenizer", "t.json"]
    assert main(words) == 0
    data = no_training[0][0].data
    assert (data.corpus, data.tokenizer) == (str(tmp_path / "text"), str(tmp_path / "t.json"))
    assert main(["train", "--preset", "tiny", "--out", "run"]) == 0
    assert (no_training[1][0].data.corpus, no_training[1][0].data.tokenizer) == ("stdlib", "train")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Returns the folder of a run at step 0 with the byte tokenizer, without weights."""
    folder = RunFolder(tmp_path / "source")
    folder.checkpoints.mkdir(parents=True)
    folder.write_config(small_run("elsewhere"))
    Tokenizer(byte_tokenizer()).save(folder.tokenizer)
    return folder.path


def test_weights_bring_their_tokenizer(no_training: list, tmp_path: Path, source: Path):
    words = ["train", "--init-from", str(source), "--preset", "tiny", "--out", str(tmp_path / "new")]
    assert main(words) == 0
    assert main([*words, "--data.tokenizer", "byte"]) == 0
    assert [config.data.tokenizer for config, _ in no_training] == [str(source / "tokenizer"), "byte"]
    assert no_training[0][0].model == small_run().model


def test_published_weights_without_a_tokenizer_want_one(
    no_training: list, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    golden = Path(__file__).parents[1] / "golden" / "v3_negative_bias"
    words = ("train", "--init-from", str(golden), "--preset", "tiny", "--out", str(tmp_path / "new"))
    assert "give --data.tokenizer" in refused(capsys, *words)
    assert not no_training


def test_init_from_has_no_effect_on_a_run_that_goes_on(
    no_training: list, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    RunFolder(tmp_path).write_config(small_run("elsewhere"))
    assert main(["train", "--init-from", "nowhere", "--out", str(tmp_path)]) == 0
    assert "--init-from has no effect" in capsys.readouterr().err
    assert no_training[0][0] == small_run("elsewhere")


@pytest.mark.parametrize(
    ("tokenizer", "warned"), [("train", True), ("byte", False), ("{source}/tokenizer", False), ("{other}", True)]
)
def test_another_tokenizer_than_that_of_the_weights_is_said(tmp_path: Path, source: Path, tokenizer: str, warned: bool):
    Tokenizer(train_bpe(["some text"], 300)).save(tmp_path / "other")
    named = tokenizer.format(source=source, other=tmp_path / "other")
    config = small_run()
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=named))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        compare_tokenizers(source, Tokenizer(byte_tokenizer()), config)
    assert ["is not the tokenizer of the weights" in str(each.message) for each in said] == [True] * warned


def test_a_locale_without_a_character_does_not_end_a_command():
    command = [sys.executable, "-m", "dsv3_jax.cli.main", "漢字\x1b[2J"]
    environment = os.environ | {"PYTHONIOENCODING": "latin-1:strict"}
    ended = subprocess.run(command, capture_output=True, env=environment, check=False, timeout=100)
    assert ended.returncode == 2
    assert ended.stderr.startswith(b"dsv3: there is no command '??\\x1b[2J'")


@pytest.mark.parametrize("command", [[], ["train"], ["eval"]])
def test_help_shows_an_example(command: list[str], capsys: pytest.CaptureFixture[str]):
    with contextlib.suppress(SystemExit):
        assert main([*command, "--help"]) == 0
    assert "runs/nano" in capsys.readouterr().out


@pytest.mark.slow
def test_eval_prints_json_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Trains one step; its evaluation from disk must agree with the one in the run's summary."""
    from dsv3_jax.runs.loop import train

    config = small_run(write_corpus(tmp_path / "corpus"))
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=1))
    outcome = train(config, tmp_path / "run")
    assert outcome.end is not None
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["step"] == 1
    assert found["main"] == pytest.approx(dataclasses.asdict(outcome.end.main))
    assert found["mtp"][0] == pytest.approx(dataclasses.asdict(outcome.end.mtp[0]))
    assert found["mtp_acceptance"] == pytest.approx(list(outcome.end.mtp_acceptance))
    assert main(["eval", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    assert "bits per byte" in printed
    assert "drafts accepted" in printed
    other = write_corpus(tmp_path / "other", documents=60)
    assert main(["eval", str(tmp_path / "run"), "--json", "--corpus", str(other)]) == 0
    assert json.loads(capsys.readouterr().out)["main"] != found["main"]


def test_every_option_of_training_says_what_it_is(capsys: pytest.CaptureFixture[str]):
    """Every option has a help text, and no two options have the same one."""
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    lines = [line.strip("│ ") for line in capsys.readouterr().out.splitlines()]
    starts = [index for index, line in enumerate(lines) if re.match(r"-h|--\w", line)]
    texts: dict[str, str] = {}
    for start in starts:
        name = lines[start].split()[0].rstrip(",")
        text = " ".join(itertools.takewhile(lambda line: not re.match(r"--\w|╰", line), lines[start + 1 :]))
        texts[name] = re.sub(r"\(default: .*?\)$", "", text).strip()
    assert len(texts) > 90
    assert not [name for name, text in texts.items() if len(text.split()) < 3], "an option without help"
    assert len(set(texts.values())) == len(texts), "one text for several options"
    ends = {name: text for name, text in texts.items() if name.endswith("-until")}
    assert "of the run's steps" in ends.pop("--training.schedule.warmup-until")
    assert [name for name, text in ends.items() if "of the run's tokens" not in text] == []
    for preset in presets():
        assert preset in texts["--preset"]
    named = {lines[start].split()[0].rstrip(","): lines[start] for start in starts}
    for name in ("balance", "moment-dtype", "rematerialisation", "pipeline-schedule", "tracker", "stop-signal"):
        assert "{" in named[f"--training.{name}"], f"{name} does not show its choices"
    for name in ("--tracker", "--data.null-texts", "--model.scoring-func", "--model.topk-method"):
        assert "{" in named[name], f"{name} does not show its choices"
