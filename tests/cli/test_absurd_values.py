"""Checks that every number that a command takes has bounds, and that a value beyond them is answered in one line.

All options of all commands are found here, none is listed: an option without bounds fails these tests.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dsv3_jax.cli.evaluate import EvaluateOptions
from dsv3_jax.cli.main import COMMANDS, main
from dsv3_jax.cli.plan import PlanOptions
from dsv3_jax.cli.train import TrainOptions
from dsv3_jax.config import RopeScaling
from dsv3_jax.errors import UserError
from dsv3_jax.runs.processes import Processes
from dsv3_jax.training.defaults import default_run

ABSURD = {
    int: (10**20, -(10**20), 2**63),
    float: (float("inf"), float("-inf"), float("nan"), 1e308, -1e308),
}
# Options of these commands are the fields of a dataclass, which is faster to walk than the command line.
WITH_DATACLASSES = ("train", "sft", "reward-model", "grpo", "plan", "eval")
# What options of the other commands take that is not a number.
NOT_NUMBERS = {
    *("--help", "--prompt", "--dtype", "--ue8m0", "--dry-run", "--no-mtp", "--tokenizer"),
    *("--task", "--problems", "--text-file", "--json", "--out", "--keep", "--reward", "--split", "--constitution"),
    *("--prompt-file", "--system", "--api-key-file", "--host", "--model-name", "--experts"),
}


def fields(owner: Any, path: str = "") -> Iterator[tuple[str, Any, str, type]]:
    """Yields the dotted name, the owner, the name and the type of each number in nested dataclasses."""
    hints = typing.get_type_hints(type(owner), include_extras=False)
    for field in dataclasses.fields(owner):
        value = getattr(owner, field.name)
        if dataclasses.is_dataclass(value):
            yield from fields(value, f"{path}{field.name}.")
            continue
        kinds = {hints[field.name]}
        if isinstance(hints[field.name], types.UnionType):
            kinds = set(typing.get_args(hints[field.name]))
        yield from ((path + field.name, owner, field.name, kind) for kind in kinds & {int, float})


def numbers() -> list[tuple[str, Any, str, type]]:
    run = default_run("tiny")
    model = dataclasses.replace(run.model, rope_scaling=RopeScaling(factor=2.0, original_max_position_embeddings=64))
    train = TrainOptions(
        out="run",
        model=model,
        data=run.data,
        training=run.training,
        lora=run.lora,
        teacher=run.teacher,
        mesh=run.mesh,
        processes=Processes(),
    )
    return [*fields(train), *fields(PlanOptions()), *fields(EvaluateOptions())]


def test_there_are_as_many_numbers_as_help_shows(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = re.findall(r"--([\w.-]+) (?:\{None\}\|)?(INT|FLOAT)\b", capsys.readouterr().out)
    walked = {name.replace("_", "-") for name, *_ in numbers()}
    assert len(shown) > 60
    assert not {name for name, _ in shown} - walked


@pytest.mark.parametrize(("path", "owner", "name", "kind"), numbers(), ids=[path for path, *_ in numbers()])
def test_every_number_of_a_configuration_has_bounds(path: str, owner: Any, name: str, kind: type):
    for value in ABSURD[kind]:
        with pytest.raises(UserError) as error:
            dataclasses.replace(owner, **{name: value})
        text = str(error.value)
        assert name in text
        assert "\n" not in text
        assert len(text) < 300


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in WITH_DATACLASSES])
def test_every_number_of_a_command_line_has_bounds(
    command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = capsys.readouterr().out.split("options:")[1].split("\nexample")[0]
    options = set(re.findall(r"^  (?:-\w, )?(--[\w-]+)", shown, re.MULTILINE))
    flags = {f"--{name}" for name in re.findall(r"--no-([\w-]+)", shown)}
    for option in sorted(options - NOT_NUMBERS - flags):
        for value in ("1" * 20, "-" + "1" * 20, "nan", "inf", "-inf", "1e308", "9" * 5000, "", "\N{DIGIT ONE}x"):
            folders = ["nowhere", "new"][: 2 if command in ("import-hf", "export-hf") else 1]
            assert main([command, *folders, f"{option}={value}"]) == 2
            line = capsys.readouterr().err
            assert line.count("\n") == 1
            assert option in line, f"{option} takes {value!r:.20}"
            assert len(line) < 300


@pytest.mark.parametrize(
    "words",
    [
        ["--training.batch-size", "99999999999999999999"],
        ["--training.seed", "1" * 30],
        ["--model.rope-theta", "1e400"],
        ["--steps", "9" * 5000],
        ["--out", "x" * 300],
        ["--out", "x/" * 3000],
        ["--data.corpus", "x" * 300],
        ["--data.tokenizer", "x" * 300],
        ["--init-from", "x" * 300],
        ["--precision", "x" * 300],
        ["--processes.coordinator", "x" * 300],
        ["--processes.coordinator", "localhost:65536", "--processes.count", "2", "--processes.index", "0"],
        ["--processes.coordinator", "localhost:" + "9" * 30, "--processes.count", "2", "--processes.index", "0"],
        ["--model.hidden-size", "16777216", "--model.num-hidden-layers", "4096"],
        ["--preset", "tiny", "--preset", "nope"],
        ["--training.zero", "--training.no-zero"],
        ["--steps", "3", "--steps=4"],
    ],
    ids=lambda words: f"{words[0]} {words[1]:.12}",
)
def test_an_absurd_command_line_is_one_line(
    words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    given = ["--preset", "tiny"] if "--preset" not in words else []
    given += ["--out", "run"] if "--out" not in words else []
    given += ["--data.vocab-size", "256", "--model.vocab-size", "256"]
    assert main(["train", *given, *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert not (tmp_path / "run").exists()
