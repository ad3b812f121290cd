"""Checks the evaluation by domain and position against sums in float64 over the model's own logits."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp
from small_models import small_model
from small_runs import small_run, write_corpus

from dsv3_jax.cli.main import main
from dsv3_jax.data import Document, Tokenizer
from dsv3_jax.data.tokenizer_training import byte_tokenizer
from dsv3_jax.errors import UserError
from dsv3_jax.evaluation.by_domain import OTHERS, DomainResults, evaluate_domains

MODEL = small_model(small_run().model, 1)
TOKENIZER = Tokenizer(byte_tokenizer())
LENGTH = 16
DOCUMENTS = [
    Document("a", "prose", "once upon a time there was a model"),
    Document("b", "code", "def f(x): return x"),
    Document("c", "prose", "and it read é and 数"),
    Document("d", "short", "no row"),
]


@pytest.mark.slow
@pytest.mark.parametrize("begins_rows", [False, True])
def test_bits_and_loads_of_each_domain(begins_rows: bool) -> None:
    results = evaluate_domains(
        MODEL, TOKENIZER, DOCUMENTS, length=LENGTH, most_rows=100, begins_rows=begins_rows, chunk=5
    )
    assert results.domains == ("prose", "code")
    total_bits, total_bytes = np.zeros(LENGTH), np.zeros(LENGTH)
    for index, name in enumerate(results.domains):
        ids = [i for d in DOCUMENTS if d.domain == name for i in (*TOKENIZER.encode(d.text), TOKENIZER.eos_id)]
        starts = range(0, len(ids) - LENGTH, LENGTH)
        rows = np.array([ids[start : start + LENGTH + 1] for start in starts])
        inputs, targets = rows[:, :-1].copy(), rows[:, 1:]
        if begins_rows:
            inputs[:, 0] = TOKENIZER.bos_id
        outs = [MODEL(jnp.asarray(row[None])) for row in inputs]
        logits = np.concatenate([np.asarray(out.logits, np.float64) for out in outs])
        nats = logsumexp(logits, axis=-1) - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
        size = TOKENIZER.token_bytes[targets]
        total_bits += nats.sum(0) / math.log(2)
        total_bytes += size.sum(0)
        assert results.bytes[index] == size.sum()
        assert results.bits_per_byte[index] == pytest.approx(nats.sum() / math.log(2) / size.sum(), rel=1e-5)
        np.testing.assert_array_equal(results.load[index], sum(np.asarray(out.routing.load) for out in outs))
    assert results.positions == (0, 1, 2, 4, 8)
    for first, end, bits in zip(results.positions, (1, 2, 4, 8, 16), results.by_position, strict=True):
        assert bits == pytest.approx(total_bits[first:end].sum() / total_bytes[first:end].sum(), rel=1e-5)


def test_overlap_of_experts() -> None:
    load = np.array([[[4, 4, 0, 0]], [[2, 2, 0, 0]], [[0, 0, 5, 5]], [[0, 4, 4, 0]]])
    results = DomainResults(("a", "b", "c", "d"), (1,) * 4, (1.0,) * 4, (0,), (1.0,), load)
    np.testing.assert_allclose(results.overlap, [[1, 1, 0, 0.5], [1, 1, 0, 0.5], [0, 0, 1, 0.5], [0.5, 0.5, 0.5, 1]])
    assert "0.50" in results.describe()


def test_small_domains_are_put_together() -> None:
    documents = [Document(str(n), f"domain {n:02d}", "x" * (40 + 20 * (n < 12))) for n in range(14)]
    results = evaluate_domains(MODEL, TOKENIZER, documents, length=LENGTH, most_rows=2)
    assert results.domains[-1] == OTHERS
    assert len(results.domains) == 13
    with pytest.raises(UserError, match="no domain"):
        evaluate_domains(MODEL, TOKENIZER, DOCUMENTS[3:], length=LENGTH, most_rows=2)


@pytest.mark.slow
def test_the_command_writes_table_json_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dsv3_jax.runs.checkpoints import Checkpoints
    from dsv3_jax.runs.folder import RunFolder
    from dsv3_jax.runs.saved_run import RunPosition
    from dsv3_jax.runs.starting_state import untrained_state

    config, run = small_run(write_corpus(tmp_path / "corpus")), RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.write_config(config)
    saving = Checkpoints(run, TOKENIZER, keep=1)
    saving.save(untrained_state(MODEL, config), RunPosition(step=0, tokens=0, data={}), config)
    saving.close()
    details = tmp_path / "details"
    assert main(["eval", str(run.path), "--details", str(details), "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["step"] == 0
    assert "experts shared" in printed.err
    assert "drafts accepted  depth 1  depth 2  tokens a step" in printed.err
    content = json.loads((details / "details.json").read_text())
    assert content["domains"] == ["txt"]
    assert content["overlap"] == [[pytest.approx(1.0)]]
    offered, accepted = (np.array(content["drafts"]["txt"][name]) for name in ("offered", "accepted"))
    assert offered.shape == accepted.shape
    assert offered[0, 0] > 0
    assert (accepted <= offered).all()
    assert (details / "details.png").read_bytes().startswith(b"\x89PNG")
