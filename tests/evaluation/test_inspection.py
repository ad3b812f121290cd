"""Checks the facts of `dsv3 inspect` against sums over the arrays themselves."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from golden_data import FOLDER as GOLDEN
from small_models import small_model
from small_runs import small_run

from dsv3_jax.cli.main import main
from dsv3_jax.config import ModelConfig
from dsv3_jax.data import Tokenizer
from dsv3_jax.data.tokenizer_training import byte_tokenizer
from dsv3_jax.evaluation import inspection
from dsv3_jax.interop.parameter_tree import arrays
from dsv3_jax.model import router_biases, set_router_biases

CONFIG = small_run().model
MODEL = small_model(CONFIG, 1)


def test_weights_are_sorted_and_summed_up() -> None:
    facts = inspection.weight_facts(MODEL)
    assert [each["largest"] for each in facts] == sorted((each["largest"] for each in facts), reverse=True)
    wanted = {name: np.asarray(array, np.float64) for name, array in arrays(MODEL).items()}
    assert {each["name"] for each in facts} == wanted.keys()
    for each in facts:
        values = wanted[each["name"]]
        assert each["shape"] == list(values.shape)
        assert each["largest"] == pytest.approx(np.abs(values).max(), rel=1e-6)
        assert each["rms"] == pytest.approx(np.sqrt((values**2).mean()), rel=1e-5)


@pytest.mark.slow
def test_the_load_of_a_text_is_that_of_the_model_without_its_padding() -> None:
    """Longer than the context: two whole rows and a part of a third."""
    length = CONFIG.max_position_embeddings
    ids = np.random.default_rng(2).integers(0, CONFIG.vocab_size, 2 * length + 7)
    load = inspection.expert_load(MODEL, ids.tolist())
    rows = [ids[:length], ids[length : 2 * length], ids[2 * length :]]
    wanted = sum(np.asarray(MODEL(jnp.asarray(row[None])).routing.load) for row in rows)
    assert isinstance(wanted, np.ndarray)
    layers, depth = CONFIG.num_moe_layers, CONFIG.num_nextn_predict_layers
    np.testing.assert_array_equal(load[:layers], wanted[:layers])
    assert load[:layers].sum() == layers * ids.size * CONFIG.num_experts_per_tok
    assert load.shape == (layers + depth, CONFIG.n_routed_experts)


def test_loads_and_biases_in_figures() -> None:
    config = ModelConfig.preset("tiny", num_hidden_layers=3, first_k_dense_replace=2)
    facts = inspection.load_facts(np.array([[4, 0, 6, 2], [3, 3, 3, 3]]), config)
    assert facts == [
        {"layer": "layer 2", "max_violation": 1.0, "unused": 1, "busiest": [2, 0, 3]},
        {"layer": "MTP 1", "max_violation": 0.0, "unused": 0, "busiest": [0, 1, 2]},
    ]
    facts = inspection.bias_facts(np.array([[-1.0, 1.0], [0.5, 0.5]]), config)
    assert facts[0] == {"layer": "layer 2", "least": -1.0, "most": 1.0, "deviation": 1.0}
    assert facts[1] == {"layer": "MTP 1", "least": 0.5, "most": 0.5, "deviation": 0.0}


def test_tokenizer_facts() -> None:
    tokenizer = Tokenizer(byte_tokenizer())
    facts = inspection.tokenizer_facts(tokenizer)
    assert facts["ids"] == f"{tokenizer.vocab_size}, of which {tokenizer.vocab_size - 256} stand for no text"
    assert facts["bytes of an id"] == "1.00 on average, 1 at most"


def test_a_published_folder_is_shown_from_its_headers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but the router biases is read of the weights."""
    from dsv3_jax.interop.safetensors_reader import TensorEntry

    read, names = TensorEntry.read, []

    def reading(entry: TensorEntry) -> np.ndarray:
        names.append(entry.name)
        return read(entry)

    monkeypatch.setattr(TensorEntry, "read", reading)
    assert main(["inspect", str(GOLDEN / "v3_negative_bias"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert names
    assert all("bias" in name for name in names)
    assert facts["architecture"]["parameters"].startswith("79,096, of which 42,232")
    assert facts["files"]["dtypes"] == "F32 119,888"
    assert [each["layer"] for each in facts["router biases"]] == ["layer 1", "layer 2", "MTP 1"]


def test_a_run_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dsv3_jax.runs.checkpoints import Checkpoints
    from dsv3_jax.runs.folder import RunFolder
    from dsv3_jax.runs.saved_run import RunPosition
    from dsv3_jax.runs.starting_state import untrained_state

    config, run = small_run(), RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.write_config(config)
    model = small_model(config.model, 3)
    set_router_biases(model, router_biases(model) + 0.25)
    saving = Checkpoints(run, Tokenizer(byte_tokenizer()), keep=1)
    saving.save(untrained_state(model, config), RunPosition(step=0, tokens=0, data={}), config)
    saving.close()
    (tmp_path / "text.txt").write_text("some text", encoding="utf-8")
    words = ["inspect", str(run.path), "--text-file", str(tmp_path / "text.txt")]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "expert load over 9 tokens" in shown
    assert "largest weights" in shown
    assert main([*words, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert {each["least"] for each in facts["router biases"]} == {0.25}
    assert len(facts["weights"]) == len(arrays(model))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["nowhere"], "nowhere holds neither a run nor a checkpoint"),
        (["{golden}", "--step", "3"], "--step needs a run"),
        (["{golden}", "--text-file", "x"], "--text-file needs a run"),
        ([], "RUN_OR_FOLDER"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", *(word.format(golden=GOLDEN / "v2_lite") for word in words)]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1
