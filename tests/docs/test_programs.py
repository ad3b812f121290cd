"""Checks the programs of the manual: each is short, uses public names only, and runs."""

from __future__ import annotations

import ast
import dataclasses
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from golden_data import FOLDER as GOLDEN
from small_models import small_model
from small_runs import write_corpus

from dsv3_jax.config import ModelConfig
from dsv3_jax.data import Tokenizer
from dsv3_jax.data.tokenizer_training import byte_tokenizer
from dsv3_jax.runs.checkpoints import Checkpoints
from dsv3_jax.runs.folder import RunFolder
from dsv3_jax.runs.saved_run import RunPosition
from dsv3_jax.runs.starting_state import untrained_state
from dsv3_jax.training.defaults import default_run

PROGRAMS = sorted((Path(__file__).parents[2] / "docs" / "programs").glob("*.py"))
ARGUMENTS = {"probe_experts": ["run"], "fine_tune": ["run", "texts", "tuned"], "published_weights": ["{golden}", "fp8"]}
SHOWS = {
    "training_loop": "19 ",
    "own_router": "WithoutGroups: tokens of the busiest expert",
    "probe_experts": "code and digits share",
    "fine_tune": "bits per byte: ",
    "published_weights": "[11, 12, 13] -> ",
}


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_a_program_is_short_and_public(path: Path) -> None:
    text = path.read_text()
    lines = [line for line in text.splitlines() if line.strip()]
    assert len(lines) < 30
    names = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {alias.name for node in names if isinstance(node, ast.Import) for alias in node.names}
    modules |= {str(node.module) for node in names if isinstance(node, ast.ImportFrom)}
    ours = {module for module in modules if module.startswith(("dsv3_jax", "pallas_kernels"))}
    assert ours == {"dsv3_jax"}, "only the public names"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with texts, and with a run at step 0 of the tiny preset and the byte tokenizer."""
    root = tmp_path_factory.mktemp("programs")
    write_corpus(root / "texts", documents=60)
    tokenizer = Tokenizer(byte_tokenizer())
    model = ModelConfig.preset("tiny", vocab_size=tokenizer.vocab_size)
    config = default_run("tiny")
    data = dataclasses.replace(config.data, vocab_size=tokenizer.vocab_size)
    config = dataclasses.replace(config, model=model, data=data)
    run = RunFolder(root / "run")
    run.path.mkdir()
    run.write_config(config)
    saving = Checkpoints(run, tokenizer, keep=1)
    saving.save(untrained_state(small_model(model, 0), config), RunPosition(step=0, tokens=0, data={}), config)
    saving.close()
    return root


@pytest.mark.slow
@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_a_program_runs(
    path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    arguments = [word.format(golden=GOLDEN / "v3_negative_bias") for word in ARGUMENTS.get(path.stem, [])]
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    values = runpy.run_path(str(path), run_name="__main__")
    assert SHOWS[path.stem] in capsys.readouterr().out
    if path.stem == "own_router":
        assert np.asarray(values["load"]).sum() > 0
