"""Checks the drafts by domain against the engine on the same beginnings, and their sums and tables by hand."""

from __future__ import annotations

import numpy as np
import pytest
from small_models import small_model
from small_runs import small_run

from dsv3_jax.data import Document, Tokenizer
from dsv3_jax.data.tokenizer_training import byte_tokenizer
from dsv3_jax.evaluation.acceptance import DraftCounts, measure_acceptance
from dsv3_jax.evaluation.by_domain import OTHERS
from dsv3_jax.evaluation.domain_drafts import DomainDrafts, measure_domains
from dsv3_jax.inference import Engine, EngineConfig, Request

TOKENIZER = Tokenizer(byte_tokenizer())
CONFIG = small_run().model.replace(max_position_embeddings=32)
TEXTS = [
    ("code", "def f(x):"),
    ("prose", "once upon a time"),
    ("code", "x"),
    ("code", "import os"),
    ("rare", "a b c d e f"),
]


@pytest.mark.slow
def test_each_domain_continues_its_own_texts() -> None:
    model = small_model(CONFIG, 1)
    documents = [Document(str(number), domain, text) for number, (domain, text) in enumerate(TEXTS)]
    found = measure_domains(model, TOKENIZER, documents, ("code", "prose", OTHERS, "absent"), prompt=8, new_tokens=10)
    assert found is not None
    assert found.domains == ("code", "prose", OTHERS)
    engine = Engine(model, EngineConfig(max_sequences=1, context=18, drafts=2, compile_at_start=False))
    for counts, texts in zip(
        found.counts, (["def f(x):", "import os"], ["once upon a time"], ["a b c d e f"]), strict=True
    ):
        prompts = [tuple(TOKENIZER.encode(text)[:8]) for text in texts]
        requests = [Request(prompt=ids, max_new_tokens=10, stop_tokens=TOKENIZER.end_ids) for ids in prompts]
        direct = measure_acceptance(engine, requests)
        np.testing.assert_array_equal(counts.offered, direct.offered)
        np.testing.assert_array_equal(counts.accepted, direct.accepted)
    assert (
        measure_domains(small_model(CONFIG.replace(num_nextn_predict_layers=0), 1), TOKENIZER, documents, ("code",))
        is None
    )


def test_sums_and_tables() -> None:
    first = DraftCounts(np.array([[4, 2], [4, 1]]), np.array([[2, 1], [1, 0]]))
    second = DraftCounts(np.array([[2, 0]]), np.array([[2, 0]]))
    drafts = DomainDrafts(("code", "prose"), (first, second))
    np.testing.assert_array_equal(drafts.total.offered, [[6, 2], [4, 1]])
    np.testing.assert_array_equal(drafts.total.accepted, [[4, 1], [1, 0]])
    lines = drafts.describe().splitlines()
    assert lines[1].split() == ["code", "0.38", "0.33", "1.50"]
    assert lines[2].split() == ["prose", "1.00", "-", "2.00"]
    assert lines[3].split()[:3] == ["all", "0.50", "0.33"]
    assert lines[-1] == "0: 0.67/0.50  1: 0.25/0.00"
    assert drafts.to_dict()["prose"] == {"offered": [[2, 0]], "accepted": [[2, 0]]}
    assert pytest.approx(1.6) == drafts.total.tokens_per_step
