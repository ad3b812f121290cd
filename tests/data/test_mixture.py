"""Checks mixtures of corpora: the share of each in the rows, that no row is lost, and that a state resumes exactly."""

from __future__ import annotations

import dataclasses
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import write_corpus

from dsv3_jax.data import DataConfig, prepare_data
from dsv3_jax.data.mixture import MixedData, MixedRows, parse_mixture
from dsv3_jax.errors import UserError


class Numbers:
    """Rows that are their own numbers."""

    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, index: int) -> Any:
        return index


@settings(max_examples=20, deadline=None)
@given(counts=st.lists(st.integers(1, 400), min_size=2, max_size=4), seed=st.integers(0, 2**32 - 1))
def test_every_row_of_every_corpus_comes_once_and_in_order(counts: list[int], seed: int) -> None:
    counts = [*counts, max(1, 1000 - sum(counts))]
    counts[0] += 1000 - sum(counts)
    if counts[0] < 1:
        return
    rows = MixedRows([Numbers()] * len(counts), counts, seed)  # pyright: ignore[reportArgumentType]
    found = [rows.locate(index) for index in range(3000)]
    for source, count in enumerate(counts):
        assert [row for which, row in found if which == source] == list(range(3 * count))
    for block in range(3):
        part = Counter(which for which, _ in found[1000 * block : 1000 * (block + 1)])
        assert [part[source] for source in range(len(counts))] == counts
    again = pickle.loads(pickle.dumps(rows))  # noqa: S301
    assert [again.locate(index) for index in (2999, 0, 1500)] == [found[2999], found[0], found[1500]]


def test_forms() -> None:
    assert parse_mixture("mix:0.7*stdlib+0.3*/a+b/c") == [("stdlib", 700), ("/a+b/c", 300)]
    assert parse_mixture("mix:1*a+1*b+1*hf:x/y:z") == [("a", 334), ("b", 333), ("hf:x/y:z", 333)]
    assert parse_mixture("mix:2*a + 6*b") == [("a", 250), ("b", 750)]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("mix:", "must have the form"),
        ("mix:a+b", "must have the form"),
        ("mix:1*a", "must have the form"),
        ("mix:1*a+1*a", "names a corpus twice"),
        ("mix:1*a+0.0001*b", "b has a weight below 1 in 1,000"),
        ("mix:0*a+0*b", "a has a weight below 1 in 1,000"),
    ],
)
def test_a_mistake_is_one_line(text: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        parse_mixture(text)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    root = tmp_path_factory.mktemp("texts")
    write_corpus(root / "few")
    (root / "other").mkdir()
    for number in range(40):
        (root / "other" / f"{number}.txt").write_text("#" * 60 + f" {number:03d}\n")
    return DataConfig(
        corpus=f"mix:0.75*{root / 'few'}+0.25*{root / 'other'}",
        tokenizer="byte",
        sequence_length=32,
        validation_fraction=0.2,
        validation_sequences=8,
        fill_in_middle_rate=0.0,
    )


def test_rows_of_a_mixture(config: DataConfig, tmp_path: Path) -> None:
    data = prepare_data(config, tmp_path)
    assert isinstance(data, MixedData)
    (mark,) = data.tokenizer.encode("#")
    tokens, _ = data.train_iterator().next_rows(1000)
    other = (tokens == mark).mean(axis=1) > 0.5
    assert other.sum() == 250
    assert data.num_train_tokens == sum(part.num_train_tokens for part in data.parts)
    assert sum(data.readings(1000 * 32)[part.config.corpus] * part.num_train_tokens for part in data.parts) == 32_000
    validation, _ = data.validation_rows()
    assert ((validation == mark).mean(axis=1) > 0.5).tolist() == [False] * 6 + [True] * 2
    assert {document.domain for document in data.documents("validation")} == {"txt"}
    assert data.validation_gzip_bits_per_byte > 0


def test_a_mixture_resumes_exactly_on_other_shards(config: DataConfig, tmp_path: Path) -> None:
    data = prepare_data(config, tmp_path)
    rows = data.train_iterator()
    rows.next_rows(6)
    state = rows.state()
    wanted, _ = rows.next_rows(8)
    shards = [prepare_data(config, tmp_path, shard_index=index, shard_count=2).train_iterator() for index in range(2)]
    for shard in shards:
        shard.set_state(state)
    found = np.stack([shard.next_rows(4)[0] for shard in shards], axis=1).reshape(8, -1)
    np.testing.assert_array_equal(found, wanted)
    changed = dataclasses.replace(config, corpus=config.corpus.replace("0.75", "0.5"))
    with pytest.raises(UserError, match=r"data\.corpus"):
        prepare_data(changed, tmp_path).train_iterator().set_state(state)
