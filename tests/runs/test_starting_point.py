"""Checks runs that start from the weights of another run or of a published checkpoint (`--init-from`)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from small_models import small_model
from small_runs import small_run

import dsv3_jax as dsv3
from dsv3_jax.cli.main import main
from dsv3_jax.data.tokenizer_training import byte_tokenizer
from dsv3_jax.errors import UserError
from dsv3_jax.interop.parameter_tree import arrays
from dsv3_jax.modules.devices import OneDevice
from dsv3_jax.runs import loop
from dsv3_jax.runs.starting_point import architecture_of_source, load_starting_point
from dsv3_jax.runs.starting_state import starting_state
from dsv3_jax.training.state_layout import StateLayout


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a published checkpoint in bfloat16 with router biases other than zero."""
    folder = tmp_path_factory.mktemp("source")
    model = small_model(small_run().model, 3)
    biases = np.random.default_rng(0).normal(size=dsv3.router_biases(model).shape)
    dsv3.set_router_biases(model, jax.numpy.asarray(biases))
    (folder / "tokenizer.json").write_text(byte_tokenizer())
    dsv3.save_hf(model, folder / "hf", dtype="bfloat16", tokenizer=folder)
    return folder / "hf"


@pytest.fixture(scope="module")
def imported(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the run folder that the checkpoint is imported to."""
    run = tmp_path_factory.mktemp("imported") / "run"
    assert main(["import-hf", str(published), str(run)]) == 0
    return run


def test_weights_are_those_of_the_source(published: Path, imported: Path) -> None:
    """From both kinds of folder: float32 parameters with the published values, router biases too."""
    wanted = arrays(dsv3.load_hf(published, dtype="float32"))
    for source in (published, imported):
        assert architecture_of_source(source) == small_run().model
        found = arrays(load_starting_point(source, small_run(), OneDevice()))
        assert found.keys() == wanted.keys()
        for path, value in found.items():
            assert value.dtype == np.float32
            np.testing.assert_array_equal(value, wanted[path])
            assert np.asarray(value).any()


def test_the_state_of_a_new_run_has_these_weights(imported: Path) -> None:
    """Its average starts from them, its moments are zero, and it has taken no steps."""
    config = small_run()
    model = load_starting_point(imported, config, OneDevice())
    _, state = starting_state(config, StateLayout(), lambda devices: load_starting_point(imported, config, devices))
    _, drawn = starting_state(config, StateLayout())
    wanted = {path: np.asarray(value) for path, value in arrays(model).items()}
    np.testing.assert_array_equal(state.router_biases, dsv3.router_biases(model))
    assert int(state.step) == 0
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(state.optimizer))
    for tree in (state.params, state.average):
        values = jax.tree.leaves(tree)
        assert sum(leaf.size for leaf in values) == sum(
            value.size for path, value in wanted.items() if not path.endswith("bias")
        )
        sums = sorted(float(np.sum(leaf, dtype=np.float64)) for leaf in values)
        expected = sorted(float(np.sum(v, dtype=np.float64)) for p, v in wanted.items() if not p.endswith("bias"))
        np.testing.assert_allclose(sums, expected, rtol=1e-6, atol=1e-6)
    assert not np.array_equal(jax.tree.leaves(drawn.params)[0], jax.tree.leaves(state.params)[0])


def test_another_architecture_is_refused(published: Path, imported: Path) -> None:
    config = small_run()
    other = dataclasses.replace(config, model=config.model.replace(kv_lora_rank=24))
    ours = config.model.kv_lora_rank
    for source in (published, imported):
        with pytest.raises(UserError, match=rf"kv_lora_rank is {ours}, not 24; give --model.kv-lora-rank {ours}"):
            load_starting_point(source, other, OneDevice())
    with pytest.raises(UserError, match="nowhere"):
        load_starting_point(published.parent / "nowhere", config, OneDevice())


def test_the_option_hands_the_weights_to_the_run(
    imported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The architecture comes from the source where it is not given; the model is loaded where the run asks for it."""
    given = []

    def train(config, out, *, initial_model=None, **_):
        assert initial_model is not None
        given.append((config, initial_model(OneDevice())))
        return loop.Outcome(0)

    monkeypatch.setattr(loop, "train", train)
    words = ["--preset", "tiny", "--model.vocab-size", "266", "--model.num-hidden-layers", "2"]
    words += ["--data.tokenizer", "byte", "--data.vocab-size", "266"]
    assert main(["train", *words, "--out", str(tmp_path / "run"), "--init-from", str(imported)]) == 0
    config, model = given[0]
    assert config.model == small_run().model
    found, wanted = arrays(model), arrays(load_starting_point(imported, small_run(), OneDevice()))
    for path, value in found.items():
        np.testing.assert_array_equal(value, wanted[path])
