"""Checks that a run's configuration survives its TOML form, and that options of the command line win over a file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from refusals import refused
from small_runs import small_run

from dsv3_jax.cli.main import main
from dsv3_jax.model_presets import presets
from dsv3_jax.runs.folder import RunFolder
from dsv3_jax.training.defaults import default_run


@pytest.mark.parametrize("preset", presets())
def test_a_run_is_repeated_from_its_toml(preset: str, no_training: list, tmp_path: Path):
    config = default_run(preset)
    corpus = 'a "quoted" name\\ with é, \x7f and 数.txt'
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, corpus=str(tmp_path / corpus)))
    RunFolder(tmp_path).write_config(config)
    assert main(["train", "--config", str(tmp_path / "run.toml"), "--out", str(tmp_path / "again")]) == 0
    assert no_training[0][0] == config


def test_options_win_over_the_file(no_training: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("my.toml").write_text(
        'preset = "tiny"\nout = "run"\nsteps = 9\n[data]\ncorpus = "text"\n[training]\nbatch_size = 8\nema_decay = 0\n'
        '[training.schedule]\nlearning_rate = 1\n[model]\nq_lora_rank = "none"\n'
        "[model.rope_scaling]\nfactor = 4\noriginal_max_position_embeddings = 64\n"
    )
    assert main(["train", "--config", "my.toml", "--training.batch-size", "2"]) == 0
    config, out = no_training[0]
    assert (config.preset, out, config.training.steps, config.training.batch_size) == ("tiny", Path("run"), 9, 2)
    assert (config.data.corpus, config.training.schedule.learning_rate) == (str(tmp_path / "text"), 1.0)
    assert config.model.q_lora_rank is None
    assert config.model.rope_scaling.factor == 4.0


@pytest.mark.parametrize(
    ("text", "words", "named"),
    [
        (None, [], ["my.toml"]),
        ("a = ", [], ["my.toml is not TOML"]),
        ("a = \udcff", [], ["my.toml is not TOML"]),
        ("[training]\nbatch_sise = 3", [], ["my.toml: training.batch_sise", "batch_size"]),
        ("[training]\nbatch_size = 'three'", [], ["training.batch_size must be a whole number", "three"]),
        ("[training]\nbatch_size = true", [], ["training.batch_size must be a whole number"]),
        ("[training]\nzero = 1", [], ["training.zero must be true or false"]),
        ("training = 3", [], ["training must be a table"]),
        ("[training]\nbatch_size = 0", [], ["training.batch_size", "not 0"]),
        (
            "[training]\nattention = 'cudnn'\n[data]\nisolate_documents = true",
            [],
            ["training.attention 'cudnn' does not keep documents apart"],
        ),
        ("[training]\nbalance = 'often'", [], ["training.balance must be one of sequence, batch, none"]),
        ("[model.rope_scaling]\nfactr = 3", [], ["rope_scaling.factr", "factor"]),
        ("[model.rope_scaling]\nfactor = 3.0", [], ["rope_scaling", "original_max_position_embeddings"]),
        ("preset = 'tiny'", ["--preset", "nano"], ["my.toml is of preset tiny, not nano"]),
        ("preset = 'tinny'", [], ["tinny", "tiny"]),
    ],
)
def test_a_mistake_in_the_file_is_one_line(
    text: str | None,
    words: list[str],
    named: list[str],
    no_training: list,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    if text is not None:
        (tmp_path / "my.toml").write_bytes(text.encode("utf-8", "surrogateescape"))
    line = refused(capsys, "train", "--config", str(tmp_path / "my.toml"), "--out", str(tmp_path / "run"), *words)
    for part in named:
        assert part in line
    assert not no_training


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--step", "4"], "--step needs --init-from or --continue-from"),
        (["--init-from", "{run}", "--continue-from", "{run}"], "give one of them"),
        (["--continue-from", "{run}", "--preset", "nano"], "holds a run of preset tiny, not nano"),
        (["--continue-from", "nowhere"], "nowhere holds no run"),
    ],
)
def test_mistakes_about_what_a_run_starts_from(
    words: list[str],
    named: str,
    no_training: list,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    folder = RunFolder(tmp_path / "source")
    folder.checkpoints.mkdir(parents=True)
    folder.write_config(dataclasses.replace(small_run("elsewhere"), model=default_run("tiny").model))
    folder.tokenizer.mkdir()
    words = [word.format(run=folder.path) for word in words]
    assert named in refused(capsys, "train", "--out", str(tmp_path / "run"), *words)
    assert not no_training


def test_the_paths_in_a_mixture_are_right_in_any_folder(
    no_training: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    words = ["train", "--preset", "tiny", "--out", "run", "--data.corpus"]
    assert main([*words, "mix:1*stdlib+3*texts+4*hf:owner/name:part"]) == 0
    assert main([*words, "hf:owner/name"]) == 0
    corpora = [config.data.corpus for config, _ in no_training]
    assert corpora == [f"mix:0.125*stdlib+0.375*{tmp_path}/texts+0.5*hf:owner/name:part", "hf:owner/name"]
