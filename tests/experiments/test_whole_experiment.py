"""One experiment from its command line to its results, and what becomes of an arm that is stopped on the way."""

from __future__ import annotations

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
from dsv3_jax.training import trainer as trainer_module
from dsv3_jax.training.run_folder import RunFolder

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
STEPS = 2
ARMS = ("loss-based", "loss-free")


def small_model() -> ModelConfig:
    """The least that has experts to watch; the same for all arms, so that few programs are compiled."""
    return ModelConfig.preset("tiny", vocab_size=266, num_hidden_layers=2, num_nextn_predict_layers=0)


def write_corpus(path: Path) -> None:
    """Texts of three alphabets as three domains, where the experiments look for their corpus."""
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
    """The script `expert_specialisation`, imported as running it would, on a smaller model."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXPERIMENTS))
        patch.setattr(importlib.import_module("ablation"), "tiny_model", small_model)
        yield importlib.import_module("expert_specialisation")
    for name in set(sys.modules) - before:
        if (EXPERIMENTS / f"{name}.py").exists():
            del sys.modules[name]


@pytest.fixture(scope="module")
def finished(experiment: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an experiment that has ended."""
    folder = tmp_path_factory.mktemp("experiment")
    write_corpus(folder / "runs" / "corpus.jsonl")
    experiment.main(command(folder))
    return folder


def command(folder: Path) -> list[str]:
    return ["--steps", str(STEPS), "--seeds", "0", "--out", str(folder / "out"), "--runs", str(folder / "runs")]


def test_numbers_figure_and_verdict_are_written(finished: Path):
    found = json.loads((finished / "out" / "expert_specialisation.json").read_text())
    assert found["seeds"] == [0]
    assert set(found["arms"]) == set(ARMS)
    assert found["verdict"].endswith("at scale tiny.")
    for arm in ARMS:
        summary = json.loads((finished / "runs" / f"{arm}-0" / "summary.json").read_text())
        assert summary["steps"] == STEPS
        assert found["arms"][arm]["validation_loss"]["values"] == [summary["validation"]["main"]["loss"]]
    assert (finished / "out" / "expert_specialisation.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_call_reads_and_trains_nothing(
    experiment: ModuleType, finished: Path, monkeypatch: pytest.MonkeyPatch
):
    result = finished / "out" / "expert_specialisation.json"
    before = result.read_text()
    result.unlink()
    monkeypatch.setattr(sys.modules["ablation"], "train", lambda *_, **__: pytest.fail("an arm was trained again"))
    experiment.main(command(finished))
    assert result.read_text() == before


def test_an_arm_that_was_stopped_goes_on_to_the_same_numbers(
    experiment: ModuleType, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ablation = sys.modules["ablation"]
    folder = finished / "runs" / "loss-free-0"
    config = RunFolder(folder).read_config()
    record = trainer_module._Run._record

    def stopping(run, *arguments) -> None:
        record(run, *arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module._Run, "_record", stopping)
        with pytest.raises(SystemExit) as stop:
            ablation.run_arm(config, tmp_path / "arm")
    assert stop.value.code == 128 + signal.SIGTERM
    assert not RunFolder(tmp_path / "arm").summary.exists()
    assert len((tmp_path / "arm" / "metrics.jsonl").read_text().splitlines()) == 2  # the first validation and one step

    resumed, expected = (ablation.run_arm(config, path) for path in (tmp_path / "arm", folder))
    assert resumed.steps == expected.steps == [1, 2]
    assert (resumed.loss, resumed.max_violation) == (expected.loss, expected.max_violation)
    assert resumed.validation == expected.validation
