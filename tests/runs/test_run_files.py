"""Checks the folder of a run: its lock, its configuration, its metrics."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small_runs import small_run

from dsv3_jax.errors import ConfigError, UserError
from dsv3_jax.runs.folder import RunFolder
from dsv3_jax.runs.metrics import JsonLines, read_metrics
from dsv3_jax.runs.plots import plot_expert_load, plot_losses
from dsv3_jax.training.config import RunConfig
from dsv3_jax.training.defaults import default_run


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    """Returns the error's message, after checking that it is a single line."""
    text = str(error.value)
    assert "\n" not in text
    return text


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path):
    """The second run is in another process, since the lock is the operating system's."""
    program = (
        "import sys; from pathlib import Path; from dsv3_jax.runs.folder import RunFolder\n"
        f"with RunFolder(Path({str(tmp_path / 'run')!r})).locked():\n"
        "    print('locked', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdin is not None
    assert other.stdout is not None
    with other:
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(UserError) as error, RunFolder(tmp_path / "run").locked():
            pass
        assert "in use by another" in one_line(error)
        other.stdin.close()
    with RunFolder(tmp_path / "run").locked():
        pass  # free again once the other process has ended


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as error, RunFolder(tmp_path / "file" / "run").locked():
        pass
    assert "cannot be written" in one_line(error)


@pytest.mark.parametrize("preset", ["tiny", "nano", "mini", "1b", "v3-671b", "moonlight-16b"])
def test_a_configuration_survives_json(preset: str):
    config = default_run(preset)
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"data": {"seed": 1}}, "data.seed"),
        ({"data": {"corpus": "elsewhere"}}, "data.corpus"),
        ({"data": {"tokenizer": "train"}}, "data.tokenizer"),
        ({"data": {"sequence_length": 16}}, "data.sequence_length"),
        ({"training": {"seed": 1}}, "training.seed"),
        ({"training": {"batch_size": 2}}, "training.batch_size"),
        ({"training": {"steps": 7}}, "training.steps"),
        ({"training": {"weight_decay": 0.2}}, "training.weight_decay"),
        ({"model": {"kv_lora_rank": 4}}, "model.kv_lora_rank"),
    ],
)
def test_resuming_with_another_configuration_names_the_field(tmp_path: Path, change: dict, named: str):
    config = small_run("corpus")
    folder = RunFolder(tmp_path)
    folder.write_config(config)
    folder.check_same_run(config)
    sections = {name: dataclasses.replace(getattr(config, name), **values) for name, values in change.items()}
    with pytest.raises(UserError) as error:
        folder.check_same_run(dataclasses.replace(config, **sections))
    assert f" {named} = " in one_line(error)


def test_settings_that_change_no_number_may_differ(tmp_path: Path):
    config = small_run("corpus")
    folder = RunFolder(tmp_path)
    folder.write_config(config)
    changed = dataclasses.replace(config.training, log_every=3, checkpoint_every=5, keep_checkpoints=1)
    folder.check_same_run(dataclasses.replace(config, training=changed))


@pytest.mark.parametrize("content", ["", "{", "{}", '{"preset": "tiny"}', "[1]", '{"preset": 1, "model": {}}'])
def test_an_unreadable_configuration_is_one_line(tmp_path: Path, content: str):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError) as error:
        RunFolder(tmp_path).read_config()
    assert "config.json" in one_line(error) or "configuration" in one_line(error)


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("training", "steps", 0),
        ("training", "batch_size", -1),
        ("training", "micro_batch_size", 3),
        ("training", "balance", "token"),
        ("training", "moment_dtype", "float16"),
        ("training", "rematerialisation", "some"),
        ("training", "beta2", 1.0),
        ("training", "epsilon", 0.0),
        ("training", "ema_decay", 1.5),
        ("data", "sequence_length", 4096),
        ("data", "sequence_length", 1),
        ("data", "vocab_size", 500),
        ("data", "validation_fraction", 0.0),
    ],
)
def test_a_wrong_field_is_named(section: str, field: str, value: object):
    config = small_run()
    if field == "vocab_size":
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer="train"))

    def change() -> RunConfig:
        changed = dataclasses.replace(getattr(config, section), **{field: value})
        return dataclasses.replace(config, **{section: changed})

    with pytest.raises(ConfigError) as error:
        change()
    assert f"{section}.{field}" in one_line(error)


def test_metrics_keep_every_bit_and_drop_lost_work(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    values = [float(np.float32(1) / np.float32(step + 3)) for step in range(6)]
    writer = JsonLines(path, 0)
    for step, value in enumerate(values, start=1):
        writer.write({"step": step, "loss": value})
    writer.write({"step": 7, "loss": float("nan"), "gradient_norm": float("inf")})
    writer.close()
    assert [record["loss"] for record in read_metrics(path)[:6]] == values
    with path.open("a") as file:
        file.write('{"step": 8, "lo')  # a process killed in the middle of a line
    writer = JsonLines(path, 4)
    writer.write({"step": 5, "loss": 0.5})
    writer.close()
    assert [(record["step"], record["loss"]) for record in read_metrics(path)] == [
        *enumerate(values[:4], start=1),
        (5, 0.5),
    ]


def test_plots_of_a_run_are_pictures(tmp_path: Path):
    records = [{"step": s, "main_loss": 5 / s, "mtp_loss": 6 / s, "max_violation": 1 / s} for s in range(1, 9)]
    records.append({"step": 8, "validation_loss": 1.0, "validation_mtp_loss": float("nan")})
    plot_losses(records, tmp_path / "loss.png", "a run")
    plot_expert_load(records, np.arange(1, 9).reshape(2, 4), ["layer 1", "MTP"], tmp_path / "load.png", "a run")
    for name in ("loss", "load"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_drawing_leaves_the_backend_of_a_notebook_alone(tmp_path: Path):
    """Another process sets the backend, draws, and checks that the backend is still the same."""
    program = (
        "import matplotlib; matplotlib.use('svg'); from pathlib import Path\n"
        "from dsv3_jax.runs.plots import plot_losses\n"
        f"plot_losses([{{'step': 1, 'main_loss': 2.0}}], Path({str(tmp_path / 'loss.png')!r}), 'a run')\n"
        "print(matplotlib.get_backend())\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=True)
    assert ended.stdout == "svg\n"
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
