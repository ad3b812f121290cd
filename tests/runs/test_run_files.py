"""Checks the folder of a run: its lock, its configuration, its metrics."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from small_models import small_model
from small_runs import assert_trees_equal, final_state, small_run
from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

from dsv3_jax.data import Tokenizer
from dsv3_jax.data.tokenizer_training import byte_tokenizer
from dsv3_jax.errors import ConfigError, UserError
from dsv3_jax.runs.checkpoints import Checkpoints
from dsv3_jax.runs.folder import RunFolder
from dsv3_jax.runs.metrics import JsonLines, TensorBoard, Terminal, describe, read_metrics
from dsv3_jax.runs.plots import plot_expert_load, plot_losses
from dsv3_jax.runs.saved_run import RunPosition
from dsv3_jax.training.config import RunConfig
from dsv3_jax.training.defaults import default_run
from dsv3_jax.training.state import new_state


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


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int):
    """Lustre without the option flock, and NFS without a lock daemon, refuse every lock."""

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    entered = []
    with pytest.warns(UserWarning, match="cannot be locked") as said, RunFolder(tmp_path / "run").locked():
        entered.append(True)
    assert (len(said), entered) == (1, [True])


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
        ({"data": {"tokenizer": "train"}}, "data.tokenizer"),
        ({"data": {"sequence_length": 16}}, "data.sequence_length"),
        ({"training": {"seed": 1}}, "training.seed"),
        ({"training": {"batch_size": 2}}, "training.batch_size"),
        ({"training": {"steps": 5}}, "training.steps"),
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


def test_a_run_may_be_made_longer_and_its_corpus_may_be_moved(tmp_path: Path):
    config = small_run("corpus")
    folder = RunFolder(tmp_path)
    folder.write_config(config)
    longer = dataclasses.replace(config.training, steps=config.training.steps + 1)
    moved = dataclasses.replace(config.data, corpus="elsewhere")
    folder.check_same_run(dataclasses.replace(config, training=longer, data=moved))


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
    writer = JsonLines(path, 0, print)
    for step, value in enumerate(values, start=1):
        writer.write({"step": step, "loss": value})
    writer.write({"step": 7, "loss": float("nan"), "gradient_norm": float("inf")})
    writer.close()
    assert [record["loss"] for record in read_metrics(path)[:6]] == values
    with path.open("a") as file:
        file.write('{"step": 8, "lo')  # a process killed in the middle of a line
    writer = JsonLines(path, 4, print)
    writer.write({"step": 5, "loss": 0.5})
    writer.close()
    assert [(record["step"], record["loss"]) for record in read_metrics(path)] == [
        *enumerate(values[:4], start=1),
        (5, 0.5),
    ]


@pytest.mark.parametrize(
    "harm",
    [
        lambda line: line.replace(b":", b";", 1),
        lambda line: line.replace(b"loss", b"\xff\xfeoss"),
        lambda line: bytes(len(line) - 1) + b"\n",
        lambda line: line.replace(b'"step": 3', b'"step": "three"'),
        lambda line: line.replace(b'"step": 3', b'"step": true'),
        lambda line: line.replace(b"0.25", b'"a quarter"'),
        lambda line: line.replace(b"0.25", b"[" * 100_000 + b"]" * 100_000),
        lambda line: line.replace(b"0.25", b"1" * 5000),
        lambda line: b"[3]\n",
    ],
)
def test_a_damaged_line_is_named_and_left_out(tmp_path: Path, harm: Callable[[bytes], bytes]):
    path, said = tmp_path / "metrics.jsonl", []
    writer = JsonLines(path, -1, said.append)
    for step in range(6):
        writer.write({"step": step, "loss": 0.25})
    writer.close()
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], harm(lines[3]), *lines[4:]]))
    assert [record["step"] for record in read_metrics(path)] == [0, 1, 2, 4, 5]
    JsonLines(path, 4, said.append).close()
    assert [record["step"] for record in read_metrics(path)] == [0, 1, 2, 4]
    assert said == [f"{path}: line 4 is damaged and left out"]


def test_metrics_that_cannot_be_read_are_begun_anew(tmp_path: Path):
    path, said = tmp_path / "metrics.jsonl", []
    path.symlink_to("/proc/self/mem")  # its reading fails with EIO
    JsonLines(path, 4, said.append).close()
    assert len(said) == 1
    assert "cannot be read (Input/output error)" in said[0]
    assert path.read_bytes() == b""


def test_a_folder_in_place_of_the_metrics_is_one_line(tmp_path: Path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError) as error:
        JsonLines(tmp_path / "metrics.jsonl", 4, print)
    assert "metrics.jsonl cannot be written: Is a directory" in one_line(error)


def test_tensorboard_files_can_be_read_by_its_own_format(tmp_path: Path):
    """Each record of a TFRecord file has its length and two checksums."""
    writer = TensorBoard(tmp_path, 3)
    writer.write({"step": 4, "loss": 0.5, "gradient_norm": "nan"})
    writer.close()
    (file,) = tmp_path.iterdir()
    content, events = file.read_bytes(), []
    while content:
        (size,) = struct.unpack("<Q", content[:8])
        body = content[12 : 12 + size]
        for part, crc in ((content[:8], content[8:12]), (body, content[12 + size : 16 + size])):
            rotated = (struct.unpack("<I", crc)[0] - 0xA282EAD8) % 2**32
            assert (rotated << 15 | rotated >> 17) % 2**32 == crc32c(part)
        events.append(Event.FromString(body))
        content = content[16 + size :]
    assert [event.WhichOneof("what") for event in events] == ["file_version", "session_log", "summary"]
    assert (events[1].step, events[2].step) == (4, 4)
    assert [(value.tag, value.simple_value) for value in events[2].summary.value] == [("loss", 0.5)]


def test_plots_of_a_run_are_pictures(tmp_path: Path):
    records = [{"step": s, "main_loss": 5 / s, "mtp_loss": 6 / s, "max_violation": 1 / s} for s in range(1, 9)]
    records.append({"step": 8, "validation_loss": 1.0, "validation_mtp_loss": float("nan")})
    plot_losses(records, tmp_path / "loss.png", "a run")
    plot_expert_load(records, np.arange(1, 9).reshape(2, 4), ["layer 1", "MTP"], tmp_path / "load.png", "a run")
    for name in ("loss", "load"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
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


@pytest.mark.parametrize("width", [80, 200])
def test_the_line_of_a_step_leaves_room_for_bar_and_time(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for name, value in (("FORCE_COLOR", "1"), ("COLUMNS", str(width)), ("TERM", "xterm"), ("NO_COLOR", "1")):
        monkeypatch.setenv(name, value)
    terminal = Terminal(steps=14_800, start=0, log_every=10, describe=describe)
    numbers = {"main_loss": 10.123, "mtp_loss": 10.5, "tokens_per_second": 123_456.0, "gradient_norm": 12.34}
    terminal.write({"step": 9_000, **numbers, "max_violation": 1.23, "mfu": 0.345})
    terminal.close()
    printed = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "\n", capsys.readouterr().out)
    (line,) = {line.rstrip() for line in printed.splitlines() if "main loss" in line}
    assert len(line) <= width
    assert "step 9000/14800" in line
    assert re.search(r"(\d|-):(\d\d|--):(\d\d|--)", line), "the time left"
    assert "━" in line, "the bar"
    assert ("MFU" in line) == (width == 200)


def test_a_model_without_routers_is_saved_and_restored(tmp_path: Path) -> None:
    """Its router biases are an array without elements, which orbax refuses."""
    config = small_run(ema_decay=0.0)
    layers = {"num_hidden_layers": 1, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0}
    config = dataclasses.replace(config, model=config.model.replace(**layers))
    _, state = new_state(small_model(config.model, 0), config)
    assert state.router_biases.size == 0
    (tmp_path / "run").mkdir()
    checkpoints = Checkpoints(RunFolder(tmp_path / "run"), Tokenizer(byte_tokenizer()), keep=1)
    checkpoints.save(state, RunPosition(step=0, tokens=0, data={}), config)
    checkpoints.close()
    restored, _ = final_state(tmp_path / "run", config, step=0)
    assert_trees_equal(restored, state)
    assert restored.router_biases.shape == state.router_biases.shape
