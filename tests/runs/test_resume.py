"""Checks that a run which was stopped, killed or damaged resumes and ends exactly as an uninterrupted one."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax
import pytest
from small_runs import assert_trees_equal, final_state

import dsv3_jax as dsv3
from dsv3_jax.data import Tokenizer
from dsv3_jax.data.tokenizer_training import byte_tokenizer
from dsv3_jax.errors import UserError
from dsv3_jax.runs import loop
from dsv3_jax.runs.checkpoints import Checkpoints, load_checkpoint
from dsv3_jax.runs.folder import RunFolder
from dsv3_jax.runs.loop import Outcome, train
from dsv3_jax.runs.metrics import JsonLines, Record, read_metrics
from dsv3_jax.runs.saved_run import list_checkpoints
from dsv3_jax.runs.start import Continuation
from dsv3_jax.training.config import RunConfig

pytestmark = pytest.mark.slow

TIMED = ("tokens_per_second", "mfu")


def assert_same_end(folder: Path, uninterrupted: Path, config: RunConfig) -> None:
    """Compares parameters, moments, average, biases, key, counters, iterator, and every number in metrics.jsonl."""
    (state, progress), (expected, expected_progress) = (final_state(path, config) for path in (folder, uninterrupted))
    assert_trees_equal(state, expected)
    assert progress == expected_progress
    for name in ("validation", "validation_at_start"):
        results = [json.loads(RunFolder(path).summary.read_text())[name] for path in (folder, uninterrupted)]
        assert results[0] == results[1] is not None

    def numbers(path: Path) -> list[dict]:
        records = read_metrics(RunFolder(path).metrics)
        return [{name: value for name, value in record.items() if name not in TIMED} for record in records]

    assert numbers(folder) == numbers(uninterrupted)


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int, kind: str, number: signal.Signals) -> None:
    """Sends this process a signal right after a record of `step` that has the field `kind` is written."""
    write = JsonLines.write

    def writing(file: JsonLines, record: Record) -> None:
        write(file, record)
        if record["step"] == step and kind in record:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(JsonLines, "write", writing)


def test_a_finished_run_has_its_results(uninterrupted: Path):
    for name in ("config.json", "metrics.jsonl", "loss.png", "expert_load.png", "summary.json", "tokenizer"):
        assert (uninterrupted / name).exists(), name
    assert [path.name for path in list_checkpoints(RunFolder(uninterrupted))] == ["00000002", "00000004", "00000006"]
    summary = json.loads((uninterrupted / "summary.json").read_text())
    before, after = (summary[name]["main"]["loss"] for name in ("validation_at_start", "validation"))
    assert after < before
    steps = [record for record in read_metrics(uninterrupted / "metrics.jsonl") if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    assert [record["tokens"] for record in steps] == [128 * step for step in range(1, 7)]


@pytest.mark.parametrize(("step", "number"), [(1, signal.SIGTERM), (3, signal.SIGINT)])
def test_a_signal_saves_and_the_run_resumes_exactly(
    config: RunConfig,
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    step: int,
    number: signal.Signals,
):
    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        stop_after(patch, step, "loss", number)
        outcome = train(config, tmp_path)
    assert outcome.exit_code == 128 + number
    assert f"saved at step {step} of 6" in capsys.readouterr().out
    assert list_checkpoints(RunFolder(tmp_path))[-1].name == f"{step:08d}"
    assert signal.getsignal(number) is handler, "the former signal handlers are restored"
    assert train(config, tmp_path).exit_code == 0
    # The checkpoint written at the stop displaces none of the later ones; all else is the same.
    assert_same_end(tmp_path, uninterrupted, config)


def test_a_run_of_muon_resumes_exactly(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With QK-clip at a threshold that some heads exceed."""
    muon = dataclasses.replace(config.training, optimizer="muon", qk_clip=1e-4)
    config = dataclasses.replace(config, training=muon)
    assert train(config, tmp_path / "whole").exit_code == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 3, "loss", signal.SIGTERM)
        assert train(config, tmp_path / "stopped").exit_code == 143
    assert train(config, tmp_path / "stopped").exit_code == 0
    assert_same_end(tmp_path / "stopped", tmp_path / "whole", config)
    records = [record for record in read_metrics(tmp_path / "whole" / "metrics.jsonl") if "loss" in record]
    assert all(record["largest_logit"] > 0 for record in records)
    adamw = dataclasses.replace(config, training=dataclasses.replace(muon, optimizer="adamw", steps=8))
    with pytest.raises(UserError, match=r"training\.optimizer"):
        train(adamw, tmp_path / "other", continuation=Continuation(RunFolder(tmp_path / "whole")))


def test_a_signal_while_evaluating_saves(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    evaluate = loop.evaluate

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(loop, "evaluate", interrupted)
    assert train(config, tmp_path).exit_code == 143
    assert [path.name for path in list_checkpoints(RunFolder(tmp_path))] == ["00000000"]


@pytest.mark.parametrize("number", [signal.SIGTERM, None])
def test_an_evaluation_that_was_interrupted_is_recorded_once(
    config: RunConfig,
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals | None,
):
    """The process is told to stop, or dies, after the checkpoint of step 2 and before its evaluation has ended."""
    evaluate, calls = loop.evaluate, []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            if number is None:
                raise SystemExit(9)
            os.kill(os.getpid(), number)
        return evaluate(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", interrupted)
        with contextlib.nullcontext() if number else pytest.raises(SystemExit):
            assert train(config, tmp_path).exit_code == 143
    assert [path.name for path in list_checkpoints(RunFolder(tmp_path))] == ["00000002"]
    assert train(config, tmp_path).exit_code == 0
    assert_same_end(tmp_path, uninterrupted, config)


def test_a_run_stopped_before_its_first_step_records_its_start_once(
    config: RunConfig, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        stop_after(patch, 0, "validation_loss", signal.SIGTERM)
        assert train(config, tmp_path).exit_code == 143
    assert train(config, tmp_path).exit_code == 0
    assert_same_end(tmp_path, uninterrupted, config)


def test_a_finished_run_is_made_longer_and_reads_a_corpus_that_was_moved(
    copy: Path, config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    moved = shutil.copytree(config.data.corpus, tmp_path / "moved")
    before = read_metrics(RunFolder(copy).metrics)
    training = dataclasses.replace(config.training, steps=8)
    longer = dataclasses.replace(config, training=training, data=dataclasses.replace(config.data, corpus=str(moved)))
    assert train(longer, copy).exit_code == 0
    assert "made longer, from 6 to 8 steps" in capsys.readouterr().out
    assert RunFolder(copy).read_config() == longer
    records = read_metrics(RunFolder(copy).metrics)
    assert records[: len(before)] == before
    assert [record["step"] for record in records[len(before) :]] == [7, 8, 8]
    assert final_state(copy, longer, step=8)[1].tokens == 8 * 128
    with pytest.raises(UserError, match=r"training\.steps = 8, not 6"):
        train(config, copy)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.parametrize("harm", [flip, truncate, Path.unlink])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    copy: Path, uninterrupted: Path, config: RunConfig, capsys: pytest.CaptureFixture[str], harm: Callable
):
    newest = RunFolder(copy).checkpoints / "00000006"
    largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    harm(largest)
    assert train(config, copy).exit_code == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert str(largest.relative_to(newest)) in printed
    assert "00000004" in printed
    assert "resuming from step 4" in printed
    assert_same_end(copy, uninterrupted, config)


def test_loading_names_a_damaged_checkpoint_and_uses_the_one_before(copy: Path):
    flip(RunFolder(copy).checkpoints / "00000006" / "run.json")
    with pytest.warns(UserWarning, match=r"run\.json is damaged"):
        model, tokenizer, step = load_checkpoint(copy)
    assert step == 4
    assert tokenizer.vocab_size <= model.config.vocab_size


def test_loading_without_a_whole_checkpoint_is_one_line(copy: Path):
    for path in list_checkpoints(RunFolder(copy)):
        (path / "manifest.json").unlink()
    with pytest.warns(UserWarning, match="manifest"), pytest.raises(UserError) as error:
        load_checkpoint(copy)
    assert "are damaged" in str(error.value)
    shutil.rmtree(RunFolder(copy).checkpoints)
    with pytest.raises(UserError, match="holds no checkpoint"):
        load_checkpoint(copy)
    with pytest.raises(UserError, match="holds no run"):
        load_checkpoint(copy / "elsewhere")


def test_nonfinite_steps_in_a_row_stop_the_run_with_its_checkpoint_intact(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    settings = loop.step_settings
    monkeypatch.setattr(
        loop,
        "step_settings",
        lambda values: (
            dataclasses.replace(settings(values), mtp_weight=jax.numpy.float32(float("nan")))
            if values.learning_rate < config.training.schedule.learning_rate
            else settings(values)
        ),
    )
    # The MTP weight is NaN in the warm-up steps before the peak and in the decay after it.
    limited = dataclasses.replace(config, training=dataclasses.replace(config.training, max_nonfinite_steps=2))
    outcome = train(limited, tmp_path)
    assert outcome.exit_code == 3
    printed = capsys.readouterr().out
    assert "not finite, so this update was skipped" in printed
    assert "2 steps in a row" in printed
    records = [record for record in read_metrics(tmp_path / "metrics.jsonl") if "loss" in record]
    assert records[-1]["loss"] == "nan"


def test_a_save_that_fails_is_one_line_and_the_checkpoint_before_stays(
    copy: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch
):
    """Saving fails as it does when the disk is full."""
    folder = RunFolder(copy)
    state, progress = final_state(copy, config)
    monkeypatch.setattr(
        "dsv3_jax.runs.checkpoints.write_manifest",
        lambda path: (_ for _ in ()).throw(OSError(28, "No space left on device")),
    )
    checkpoints = Checkpoints(folder, Tokenizer(byte_tokenizer()), keep=3)
    checkpoints.save(state, dataclasses.replace(progress, step=8), config)
    with pytest.raises(UserError, match="No space left on device") as error:
        checkpoints.wait()
    assert "\n" not in str(error.value)
    checkpoints.close()
    assert [path.name for path in list_checkpoints(folder)] == ["00000002", "00000004", "00000006"]


def test_only_the_newest_checkpoints_are_kept(copy: Path, config: RunConfig):
    folder = RunFolder(copy)
    state, progress = final_state(copy, config)
    checkpoints = Checkpoints(folder, Tokenizer(byte_tokenizer()), keep=2)
    for step in (8, 10):
        checkpoints.save(state, dataclasses.replace(progress, step=step), config)
    checkpoints.close()
    assert [path.name for path in list_checkpoints(folder)] == ["00000008", "00000010"]
    assert not list(folder.checkpoints.glob(".*"))


def test_a_run_killed_while_saving_resumes_exactly(
    config: RunConfig, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The process that started the run sends SIGKILL while the second checkpoint is being written."""
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    program = (
        "import sys, json; from pathlib import Path\n"
        "import jax\n"
        f"jax.config.update('jax_compilation_cache_dir', {str(jax.config.jax_compilation_cache_dir)!r})\n"
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)\n"
        "from dsv3_jax.training.config import RunConfig; from dsv3_jax.runs.loop import train\n"
        f"config = RunConfig.from_dict(json.loads(Path({str(tmp_path / 'config.json')!r}).read_text()))\n"
        f"train(config, Path({str(tmp_path / 'run')!r}))\n"
    )
    folder = RunFolder(tmp_path / "run")
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    with subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 200
        while process.poll() is None and time.monotonic() < deadline:
            if list(folder.checkpoints.glob(".writing-00000004*")) or len(list_checkpoints(folder)) > 1:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.001)
        assert process.wait() == -signal.SIGKILL
    assert train(config, folder.path).exit_code == 0
    assert_same_end(folder.path, uninterrupted, config)
    assert not list(folder.checkpoints.glob(".*")), "the half-written checkpoint is gone"


def test_saving_returns_before_the_files_are_written(copy: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch):
    """Saving is asynchronous: the state may change as soon as `save` returns."""
    state, progress = final_state(copy, config)
    gate = threading.Event()
    from dsv3_jax.runs import checkpoints as module

    write = module.write_manifest
    monkeypatch.setattr(module, "write_manifest", lambda path: (gate.wait(30), write(path)))
    checkpoints = Checkpoints(RunFolder(copy), Tokenizer(byte_tokenizer()), keep=5)
    checkpoints.save(state, dataclasses.replace(progress, step=9), config)
    assert not (RunFolder(copy).checkpoints / "00000009").exists()
    jax.tree.map(lambda leaf: leaf.delete(), state.params)
    gate.set()
    checkpoints.close()
    assert_trees_equal(final_state(copy, config, 9)[0].params, final_state(copy, config)[0].params)


def test_an_outcome_reports_validation(copy: Path, uninterrupted: Path, config: RunConfig):
    """A finished run that is started again only evaluates, and records nothing again."""
    outcome = train(config, copy)
    assert isinstance(outcome, Outcome)
    assert outcome.start is not None
    assert outcome.end is not None
    assert outcome.start == outcome.end
    for name in ("metrics.jsonl", "summary.json"):
        assert (copy / name).read_text() == (uninterrupted / name).read_text(), name


def test_the_public_function_trains_into_a_folder_named_after_the_preset(
    config: RunConfig, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert dsv3.train(config).exit_code == 0
    assert_same_end(tmp_path / "runs" / config.preset, uninterrupted, config)
    with pytest.raises(UserError, match=r"training\.seed = 0, not 1: give that value to resume it, or another --out"):
        dsv3.train(dataclasses.replace(config, training=dataclasses.replace(config.training, seed=1)))
