"""Checks one experiment from its command line to its results, and that an arm which was stopped is resumed."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import random
import signal
import sys
from pathlib import Path
from types import ModuleType

import pytest

from dsv3_jax.config import ModelConfig
from dsv3_jax.runs.metrics import JsonLines, Record, read_metrics

pytestmark = pytest.mark.slow

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
STEPS = 2
# Both arms have the same fields here, so that the first shows how the second should end.
WHOLE, STOPPED = "loss-based", "loss-free"


def small_model() -> ModelConfig:
    """Returns the smallest model that has routed experts."""
    return ModelConfig.preset(
        "tiny", vocab_size=266, num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0
    )


def write_corpus(path: Path) -> None:
    """Writes texts in three alphabets, one per domain, to where the experiments look for their corpus."""
    draw = random.Random(0)
    alphabets = {"code": "abcdef(): ", "prose": "klmnopqrst ", "mathematics": "0123456789+= "}
    rows = [
        {"text": "".join(draw.choices(alphabet, k=200)), "domain": domain, "name": f"{domain}-{number}"}
        for domain, alphabet in alphabets.items()
        for number in range(40)
    ]
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def experiment():
    """Imports the script `expert_specialisation`, with a smaller model and two arms that share one compiled program."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXPERIMENTS))
        patch.setattr(importlib.import_module("ablation"), "tiny_model", small_model)
        script = importlib.import_module("expert_specialisation")
        patch.setattr(script, "ARMS", {WHOLE: {"balance": "none"}, STOPPED: {"balance": "none"}})
        yield script
    for name in set(sys.modules) - before:
        if (EXPERIMENTS / f"{name}.py").exists():
            del sys.modules[name]


@dataclasses.dataclass(frozen=True)
class Finished:
    """The results of an experiment that was stopped in its second arm and called again.

    Attributes:
      folder: with the results in out and the arms in runs.
      code: how the first call ended.   left: what it left.   trained: the arms that the second call trained.
    """

    folder: Path
    code: int
    left: list[str]
    trained: list[str]


@pytest.fixture(scope="module")
def finished(experiment: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("experiment")
    write_corpus(folder / "runs" / "corpus.jsonl")
    command = ["--steps", str(STEPS), "--seeds", "0", "--out", str(folder / "out"), "--runs", str(folder / "runs")]
    write, train = JsonLines.write, sys.modules["ablation"].train

    def stopping(file: JsonLines, record: Record) -> None:
        write(file, record)
        if Path(file._file._path).parent.name == f"{STOPPED}-0" and "loss" in record:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JsonLines, "write", stopping)
        with pytest.raises(SystemExit) as stop:
            experiment.main(command)
    left = sorted(path.parent.name for path in folder.glob("*/*/summary.json"))
    trained = []

    def counting(config, out: Path, **start):
        trained.append(out.name)
        return train(config, out, **start)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["ablation"], "train", counting)
        experiment.main(command)
    return Finished(folder, stop.value.code, left, trained)  # pyright: ignore[reportArgumentType]


def test_numbers_figure_and_verdict_are_written(finished: Finished):
    out, runs = finished.folder / "out", finished.folder / "runs"
    found = json.loads((out / "expert_specialisation.json").read_text())
    assert found["seeds"] == [0]
    assert found["verdict"].endswith("at scale tiny.")
    for arm in (WHOLE, STOPPED):
        summary = json.loads((runs / f"{arm}-0" / "summary.json").read_text())
        assert summary["steps"] == STEPS
        assert found["arms"][arm]["validation_loss"]["values"] == [summary["validation"]["main"]["loss"]]
    assert (out / "expert_specialisation.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_call_trains_only_what_had_not_ended(finished: Finished):
    assert finished.code == 128 + signal.SIGTERM
    assert finished.left == [f"{WHOLE}-0"]
    assert finished.trained == [f"{STOPPED}-0"]


def test_a_stopped_arm_ends_with_the_numbers_of_one_that_was_not(finished: Finished):
    timed = ("tokens_per_second", "mfu")
    whole, stopped = (
        [
            {name: value for name, value in record.items() if name not in timed}
            for record in read_metrics(finished.folder / "runs" / f"{arm}-0" / "metrics.jsonl")
        ]
        for arm in (WHOLE, STOPPED)
    )
    assert [record["step"] for record in whole if "loss" in record] == [1, 2]
    assert stopped == whole
    numbers = json.loads((finished.folder / "out" / "expert_specialisation.json").read_text())
    assert numbers["arms"][STOPPED] == numbers["arms"][WHOLE]
