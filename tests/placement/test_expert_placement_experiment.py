"""Checks the experiment on expert placement: its arithmetic against counts by hand, and what it refuses."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from small_models import small_model

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import UserError

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture
def experiment(monkeypatch: pytest.MonkeyPatch):
    """Imports the script with the import path that running it would have."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    yield importlib.import_module("expert_placement")
    for name in set(sys.modules) - before:
        if (EXPERIMENTS / f"{name}.py").exists():
            del sys.modules[name]


@pytest.fixture
def small(experiment: ModuleType):
    """Returns two ranks in two nodes, four experts in two groups, and two redundant copies."""
    return experiment.Ranks(ranks=2, nodes=2, groups=2, redundant=2)


def test_in_order_is_a_sum_over_neighbours(experiment, small):
    load = np.array([[8.0, 2.0, 1.0, 1.0]])
    placement = experiment.place("in order", load, small)
    np.testing.assert_array_equal(placement.device_loads(load), [[10.0, 2.0]])
    assert experiment.imbalances(np.stack([load, load]), small, "in order")["placed by"] == 10 / 6


def test_hierarchical_keeps_groups_in_their_nodes_and_global_does_not(experiment, small):
    load = np.array([[9.0, 9.0, 1.0, 1.0]])
    within = experiment.place("hierarchical", load, small)
    assert {frozenset(rank) for rank in (within.logical[0, :3], within.logical[0, 3:])} == {
        frozenset({0, 1}),
        frozenset({2, 3}),
    }
    found = {policy: experiment.imbalances(np.stack([load, load]), small, policy) for policy in experiment.POLICIES}
    assert found["in order"]["placed by"] == found["hierarchical"]["placed by"] == 1.8
    assert found["global"]["placed by"] == 1.0


def test_a_placement_is_judged_on_loads_it_has_not_seen(experiment, small):
    earlier, later = np.array([[9.0, 1.0, 1.0, 1.0]]), np.array([[1.0, 1.0, 1.0, 9.0]])
    swapped = experiment.imbalances(np.stack([earlier, later]), small, "global")
    same = experiment.imbalances(np.stack([earlier, earlier]), small, "global")
    assert swapped["placed by"] == same["placed by"] == same["served after"]
    placement = experiment.place("global", earlier, small)
    each = [sum(later[0, e] / placement.counts[0, e] for e in rank) for rank in placement.logical.reshape(2, 3)]
    assert swapped["served after"] == max(each) / np.mean(each) > same["served after"]


def test_more_copies_never_hurt_the_loads_they_are_made_for(experiment, small):
    load = np.array([[90.0, 5.0, 3.0, 2.0]])
    swept = experiment.sweep([np.stack([load, load])], small)
    assert list(swept["global"]) == [0, 2, 4, 6, 8]
    values = list(swept["global"].values())
    assert values == sorted(values, reverse=True)
    assert values[0] > values[-1]


def test_loads_from_a_file(experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "mine.npy"
    np.save(path, np.array([[40, 8, 1, 1, 1, 1, 1, 1]]))
    out = tmp_path / "out"
    ranks = ["--ranks", "4", "--nodes", "2", "--redundant", "4"]
    experiment.main(["--loads", str(path), *ranks, "--out", str(out), "--runs", str(tmp_path)])
    found = json.loads((out / "expert_placement.json").read_text())
    values = found["busiest_rank_over_mean"]
    assert values["in order"]["served after"] == pytest.approx(48 / 13.5)
    assert values["global"]["served after"] <= values["hierarchical"]["served after"] < 48 / 13.5
    assert found["loads"] == "mine.npy"
    assert (out / "expert_placement.png").exists()
    assert "logits" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("loads", "options", "message"),
    [
        (None, [], "--loads"),
        (np.ones(8), [], "must hold numbers"),
        (np.full((1, 8), "x"), [], "must hold numbers"),
        (-np.ones((1, 8)), [], "finite"),
        (np.ones((1, 8)), ["--ranks", "3"], "must divide"),
        (np.ones((1, 8)), ["--nodes", "3"], "must divide"),
    ],
    ids=["no-file", "one-axis", "text", "negative", "ranks", "nodes"],
)
def test_what_cannot_be_placed_is_one_line(experiment, tmp_path, capsys, loads, options, message):
    path = tmp_path / "loads.npy"
    if loads is not None:
        np.save(path, loads)
    with pytest.raises(SystemExit) as stop:
        experiment.main(["--loads", str(path), *options, "--out", str(tmp_path / "out"), "--runs", str(tmp_path)])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_what_a_model_serves_is_counted_and_its_copies_give_its_logits(experiment):
    config = ModelConfig.preset("tiny", num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0)
    model = small_model(config, seed=0)
    rows = np.random.default_rng(0).integers(0, config.vocab_size, (17, 4), np.int32)
    served = experiment.ServedTexts(model, {"code": rows})
    recording = served.record("code")
    assert recording.shape == (experiment.WINDOWS, 1, config.n_routed_experts)
    np.testing.assert_array_equal(recording.sum(axis=2), 2 * 4 * config.num_experts_per_tok)
    placement = experiment.place("global", recording.sum(axis=0), experiment.Ranks(ranks=4, redundant=4))
    assert served.change_of_logits("code", placement) < 1e-6
    swapped = dataclasses.replace(placement, logical=placement.logical[:, ::-1])  # two experts exchanged
    assert served.change_of_logits("code", swapped) > 1e-6


def test_too_little_text_is_one_line(experiment):
    served = experiment.ServedTexts(None, {None: np.zeros((3, 4), np.int32)})
    with pytest.raises(UserError, match="at least 8 rows"):
        served.record(None)
