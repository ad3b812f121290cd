"""Compares the adapter of lm-evaluation-harness with the harness's own backend on a golden checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness_tasks import TASKS, write_tasks
from safetensors.numpy import load_file, save_file

from dsv3_jax.data import Tokenizer, plain_template
from dsv3_jax.data.tokenizer_training import byte_tokenizer
from dsv3_jax.interop import load_hf

HERE = Path(__file__).parent
GOLDEN = HERE.parent / "golden" / "v3_yarn_small"
CONTEXT = 96
pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore:.*without MTP")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the golden checkpoint with a tokenizer of bytes, and random rows for the ten tokens that it lacks."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = Tokenizer(byte_tokenizer())
    config = json.loads((GOLDEN / "config.json").read_text())
    missing = tokenizer.vocab_size - config["vocab_size"]
    tensors = load_file(GOLDEN / "model.safetensors")
    for seed, part in enumerate(("embed_tokens", "head.weight")):  # the MTP layer has copies of both
        for name, value in tensors.items():
            if part in name and value.shape[0] == config["vocab_size"]:
                rows = np.random.default_rng(seed).normal(0, value.std(), (missing, value.shape[1]))
                tensors[name] = np.concatenate([value, rows.astype(value.dtype)])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    end = tokenizer.to_bytes([tokenizer.eos_id]).decode()
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": tokenizer.vocab_size}))
    (folder / "tokenizer.json").write_text(byte_tokenizer())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "add_bos_token": False}
    settings |= {"pad_token": end, "chat_template": plain_template(tokenizer)}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def theirs(oracle_python: str, folder: Path, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    command = [oracle_python, str(HERE / "harness_side.py"), str(folder), str(tasks), str(CONTEXT), *TASKS]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path_factory.mktemp("hf"))}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | offline)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("chat", [False, True], ids=["texts", "chats"])
def test_answers_are_those_of_the_harness(
    theirs: list[Any], folder: Path, tasks: Path, chat: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from dsv3_jax.evaluation.harness import HarnessModel

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = HarnessModel(load_hf(folder), Tokenizer.load(folder), context=CONTEXT)
    found = simple_evaluate(
        model,
        tasks=list(TASKS)[: 2 if chat else 3],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        apply_chat_template=chat,
        bootstrap_iters=0,
    )
    assert found is not None
    wanted = theirs[chat]
    for task, rows in found["samples"].items():
        ours = json.loads(json.dumps([row["resps"] for row in rows], default=str))
        assert len(ours) == len(wanted["answers"][task])
        for mine, other in zip(ours, wanted["answers"][task], strict=True):
            compare(mine, other)
    for task, metrics in wanted["results"].items():
        for name, value in metrics.items():
            if isinstance(value, float):
                assert found["results"][task][name] == pytest.approx(value, rel=1e-5), (task, name)


def compare(ours: Any, theirs: Any) -> None:
    """Compares texts and flags exactly; log-likelihoods are sums of at most 156 float32 logits below 10."""
    if isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            compare(mine, other)
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, abs=1e-3, rel=1e-5)
    else:
        assert ours == theirs
