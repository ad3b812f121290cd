"""Checks `dsv3 sft`: it is pre-training with another loss mask, resumes exactly, and its result is a run like any."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from small_runs import assert_trees_equal, final_state, small_run

from dsv3_jax.cli import sft
from dsv3_jax.cli.main import main
from dsv3_jax.data.splitting import name_hash
from dsv3_jax.errors import UserError
from dsv3_jax.runs.checkpoints import load_checkpoint, load_run
from dsv3_jax.runs.evaluation import Evaluation, evaluate_loaded, load_run_with_data
from dsv3_jax.runs.folder import RunFolder
from dsv3_jax.runs.loop import train
from dsv3_jax.runs.metrics import read_metrics
from dsv3_jax.runs.saved_run import list_checkpoints
from dsv3_jax.training.adapters import published_adapters, with_adapters
from dsv3_jax.training.state import split_model

pytestmark = pytest.mark.slow


def test_fine_tuning_on_whole_texts_is_pre_training(tmp_path: Path):
    """Three training texts fill one row of 33 tokens exactly, so that both ways of packing give the same rows."""
    name = next(
        f"t{n}.jsonl"
        for n in range(1000)
        if [name_hash(f"t{n}.jsonl:{line}") < 0.5 for line in range(1, 7)] == [False, True] * 3
    )
    lines = [json.dumps({"text": f"text {number:5d}"}) for number in range(6)]
    (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
    run = small_run(tmp_path / name, steps=2, batch_size=2, micro_batch_size=0)
    data = {"isolate_documents": True, "fill_in_middle_rate": 0.0, "validation_fraction": 0.5}
    states = []
    for form in ("text", "conversations"):
        config = dataclasses.replace(run, data=dataclasses.replace(run.data, form=form, **data))
        assert train(config, tmp_path / form).exit_code == 0
        states.append(final_state(tmp_path / form, config, step=2)[0])
    assert_trees_equal(*states)


@pytest.fixture(scope="module")
def tuned(uninterrupted: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Returns the folder of a run that was fine-tuned by the command line, and the command."""
    folder = tmp_path_factory.mktemp("tuned")
    turns = [[("user", f"{n} + 1?"), ("assistant", f"{n + 1}.")] for n in range(30)]
    chats = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in turns]
    data = folder / "chats.jsonl"
    data.write_text("".join(json.dumps(chat) + "\n" for chat in chats), encoding="utf-8")
    command = ["sft", str(uninterrupted), "--data", str(data), "--out", str(folder / "run"), "--precision", "float32"]
    command += ["--training.checkpoint-every", "2", "--learning-rate", "1e-3"]
    assert main(command) == 0
    return folder / "run", command


def test_two_epochs_with_the_reports_schedule(tuned: tuple[Path, list[str]]):
    run = RunFolder(tuned[0])
    config, steps = run.read_config(), [record for record in read_metrics(run.metrics) if "loss" in record]
    assert len(steps) == config.training.steps
    rows = int(config.training.steps) * config.training.batch_size
    assert 2 * 29 / 3 <= rows < 2 * 29 + 4  # samples of 12 to 14 tokens in rows of 33
    progress = np.arange(len(steps)) / len(steps)
    expected = 1e-3 * (0.2 + 0.8 * 0.5 * (1 + np.cos(np.pi * progress)))
    np.testing.assert_allclose([record["learning_rate"] for record in steps], expected, rtol=1e-6)
    assert steps[-1]["main_loss"] < steps[0]["main_loss"]


def test_router_biases_are_frozen_unless_asked(tuned: tuple[Path, list[str]], uninterrupted: Path):
    config = RunFolder(tuned[0]).read_config()
    before, _ = final_state(uninterrupted, RunFolder(uninterrupted).read_config())
    after, _ = final_state(tuned[0], config, step=config.training.steps)
    assert_trees_equal(before.router_biases, after.router_biases)


def test_it_resumes_bit_for_bit(tuned: tuple[Path, list[str]], tmp_path: Path):
    folder, command = tuned
    config = RunFolder(folder).read_config()
    expected, progress = final_state(folder, config, step=config.training.steps)
    copy = shutil.copytree(folder, tmp_path / "run")
    newest = list_checkpoints(RunFolder(copy))[-1]
    shutil.rmtree(newest)
    assert main([*command[:5], str(copy), *command[6:]]) == 0
    state, position = final_state(copy, config, step=config.training.steps)
    assert_trees_equal(state, expected)
    assert position == progress


def test_its_result_is_a_run(tuned: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder, _ = tuned
    result = evaluate_loaded(*load_run_with_data(folder))
    assert isinstance(result, Evaluation)
    summary = json.loads(RunFolder(folder).summary.read_text(encoding="utf-8"))
    assert result.main.loss == pytest.approx(summary["validation"]["main"]["loss"], rel=1e-6)
    assert main(["generate", str(folder), "--prompt", "<｜User｜>1 + 1?<｜Assistant｜>", "--max-new-tokens", "2"]) == 0
    assert main(["export-hf", str(folder), str(tmp_path / "published")]) == 0
    assert "chat_template" in " ".join(path.name for path in (tmp_path / "published").iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give the folder of a run"),
        (["RUN", "--data", "DATA"], "--out is missing"),
        (["RUN", "--out", "NEW"], "--data is missing"),
        (["missing", "--data", "DATA", "--out", "NEW"], "missing"),
        (["RUN", "--data", "missing.jsonl", "--out", "NEW"], "missing.jsonl does not exist"),
        (["RUN", "--data", "DATA", "--out", "RUN"], "holds a run of dsv3 train"),
        (["RUN", "--data", "DATA", "--out", "NEW", "--sequence-length", "9"], "too long.*--drop-overlong"),
    ],
)
def test_mistakes_are_one_line(tuned, uninterrupted, tmp_path, arguments: list[str], message: str):
    names = {"RUN": str(uninterrupted), "DATA": tuned[1][3], "NEW": str(tmp_path / "new")}
    with pytest.raises(UserError, match=message):
        sft.main([names.get(word, word) for word in arguments])
    assert not (tmp_path / "new").exists()


def test_adapters_are_merged_when_a_run_is_loaded_and_written_for_peft(tuned, uninterrupted: Path, tmp_path: Path):
    out = tmp_path / "run"
    options = ["--lora.rank", "2", "--lora.targets", "all", "--steps", "1", "--learning-rate", "0.01"]
    source = RunFolder(shutil.copytree(uninterrupted, tmp_path / "source"))
    trained = source.read_config()
    by_muon = dataclasses.replace(trained.training, optimizer="muon", qk_clip=5.0)
    source.write_config(dataclasses.replace(trained, training=by_muon))
    command = ["sft", str(source.path), *tuned[1][2:5], str(out), "--precision", "float32", *options]
    assert main(command) == 0
    config = RunFolder(out).read_config()
    assert (config.training.optimizer, config.training.qk_clip) == ("adamw", 0.0)
    state, _ = final_state(out, config, step=1)
    loaded = load_run(out)
    merged = split_model(loaded.model)[1]
    assert_trees_equal(merged, with_adapters(state.params, state.adapters, config.lora))
    base, _, _ = load_checkpoint(uninterrupted)
    assert_trees_equal(state.params, split_model(base)[1])
    assert main(["export-hf", str(out), str(tmp_path / "adapters"), "--adapters"]) == 0
    tensors = load_file(tmp_path / "adapters" / "adapter_model.safetensors")
    expected = published_adapters(state.adapters, config.model, config.lora)
    assert tensors.keys() == expected.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
    assert main(["export-hf", str(uninterrupted), str(tmp_path / "none"), "--adapters"]) == 2


def test_a_student_learns_from_a_teacher(tuned, uninterrupted: Path, tmp_path: Path):
    """The teacher is the fine-tuned run, the student the run it started from; a resumed run ends as another does."""
    folder, command = tuned
    distil = [*command[:5], "RUN", *command[6:], "--teacher.run", str(folder), "--teacher.weight", "1", "--epochs", "3"]
    runs = [tmp_path / "one", tmp_path / "two"]
    for run in runs:
        assert main([*distil[:5], str(run), *distil[6:]]) == 0
        if run is runs[1]:
            shutil.rmtree(list_checkpoints(RunFolder(run))[-1])
            assert main([*distil[:5], str(run), *distil[6:]]) == 0
    config = RunFolder(runs[0]).read_config()
    assert config.teacher.run == str(folder)
    states = [final_state(run, config, step=config.training.steps)[0] for run in runs]
    assert_trees_equal(*states)
    losses = [r["distillation_loss"] for r in read_metrics(RunFolder(runs[0]).metrics) if "distillation_loss" in r]
    assert losses[-1] < 0.7 * losses[0]


def test_a_teacher_with_another_tokenizer_is_refused(tuned, uninterrupted: Path, tmp_path: Path, capsys):
    folder, command = tuned
    other = shutil.copytree(folder, tmp_path / "teacher")
    text = (other / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8")
    (other / "tokenizer" / "tokenizer.json").write_text(text.replace("User", "Human"), encoding="utf-8")
    assert main([*command[:5], str(tmp_path / "new"), *command[6:], "--teacher.run", str(other)]) == 2
    assert "another tokenizer" in capsys.readouterr().err
