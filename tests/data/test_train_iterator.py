"""Checks that every target comes once per epoch, whatever the shards, workers, batches and restarts."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv3_jax.data import Data, DataConfig, TrainIterator, prepare_data
from dsv3_jax.data import control_tokens as control
from dsv3_jax.data.epoch import Epoch
from dsv3_jax.errors import UserError

LENGTH = 16
PLAIN = DataConfig(
    corpus="set by the fixture",
    tokenizer="byte",
    sequence_length=LENGTH,
    fill_in_middle_rate=0.0,
    validation_fraction=0.1,
)
ALL: dict[str, Any] = {"fill_in_middle_rate": 0.3, "punctuation_split_rate": 0.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with sixty texts of 10 to 90 characters."""
    root = tmp_path_factory.mktemp("corpus")
    random = np.random.default_rng(0)
    for number in range(60):
        words = random.choice(["ab", "cde();\n", "é", "漢", "f\n\n"], random.integers(3, 20))
        (root / f"{number:02d}.txt").write_text(f"{number} {' '.join(words)}", encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def prepare(folder: Path, cache: Path | None = None, *, shard: tuple[int, int] = (0, 1), **changes: Any) -> Data:
    config = dataclasses.replace(PLAIN, corpus=str(folder), **changes)
    return prepare_data(config, cache, shard_index=shard[0], shard_count=shard[1])


def epoch_of(iterator: TrainIterator) -> int:
    """Returns the epoch of the next row."""
    return iterator._source.locate(iterator.state()["rows_taken"])[0]


def take_epoch(iterator: TrainIterator, number: int) -> tuple[np.ndarray, np.ndarray]:
    rows = []
    while epoch_of(iterator) == number:
        rows.append(iterator.next_rows(1))
    tokens, segments = zip(*rows, strict=True)
    return np.concatenate(tokens), np.concatenate(segments)


def targets_by_input(tokens: np.ndarray, segments: np.ndarray) -> Counter[tuple[int, int]]:
    """Returns how often each (input, target) pair occurs among the real targets."""
    real = segments[:, 1:] > 0
    return Counter(zip(tokens[:, :-1][real].tolist(), tokens[:, 1:][real].tolist(), strict=True))


def test_two_epochs_hold_every_pair_of_neighbours_once(folder: Path) -> None:
    data = prepare(folder)
    tokenizer, expected = data.tokenizer, Counter[tuple[int, int]]()
    texts = [document.text for document in data.documents("train")]
    for text in texts:
        ids = [*tokenizer.encode(text), tokenizer.eos_id]
        expected.update(pairwise(ids))
    iterator = data.train_iterator()
    epochs = [take_epoch(iterator, number) for number in range(2)]
    for tokens, segments in epochs:
        pairs = targets_by_input(tokens, segments)
        between = Counter({pair: count for pair, count in pairs.items() if pair[0] == tokenizer.eos_id})
        assert between.total() == len(texts) - 1  # the first token of each document but the first
        assert pairs - between == expected
        assert data.num_train_tokens == expected.total() + len(texts)
        follows = tokens[1:, 0] == tokens[:-1, -1]
        assert follows.mean() < 0.5  # rows are shuffled, so a row seldom continues the one before it
    assert len(epochs[0][0]) == len(epochs[1][0])
    assert not np.array_equal(epochs[0][0], epochs[1][0])  # another order


def test_documents_are_shuffled_before_packing(folder: Path) -> None:
    """Otherwise neighbours in the corpus would share a row in every epoch."""
    data = prepare(folder, sequence_length=256, validation_fraction=0.4)
    place = {document.text: index for index, document in enumerate(data.documents("train"))}
    tokens, segments = take_epoch(data.train_iterator(), 0)
    steps = []
    for row, owners in zip(tokens, segments, strict=True):
        whole = [data.tokenizer.decode(row[owners == owner][:-1]) for owner in range(2, owners.max())]
        steps += [place[second] - place[first] for first, second in pairwise(whole)]
    assert len(steps) > 10
    assert np.mean(np.array(steps) == 1) < 0.3


def test_rearranged_and_split_documents_come_once_too(folder: Path) -> None:
    data = prepare(folder, tokenizer="train", vocab_size=340, **ALL)
    tokenizer, iterator = data.tokenizer, data.train_iterator()
    text = "".join(document.text for document in data.documents("train"))
    count = sum(1 for _ in data.documents("train"))
    shares, lengths = [], []
    for number in range(6):
        tokens, segments = take_epoch(iterator, number)
        targets = tokens[:, 1:][segments[:, 1:] > 0]
        inside = Counter(targets.tolist())
        begun = inside[tokenizer.control_id(control.FIM_BEGIN)]
        assert abs(begun - inside[tokenizer.control_id(control.FIM_HOLE)]) <= 1  # the stream's first token is no target
        assert inside[tokenizer.control_id(control.FIM_HOLE)] == inside[tokenizer.control_id(control.FIM_END)]
        assert inside[tokenizer.eos_id] == count
        seen = Counter(tokenizer.to_bytes(targets[tokenizer.token_bytes[targets] > 0]))
        missing = Counter(text.encode()) - seen
        assert not seen - Counter(text.encode())
        assert missing.total() <= max(tokenizer.token_bytes)  # the stream's first token, as above
        shares.append(inside[tokenizer.control_id(control.FIM_HOLE)] / count)
        lengths.append(len(targets))
    assert 0.15 < np.mean(shares) < 0.45
    assert len(set(shares)) > 1  # other documents in other epochs
    assert max(lengths) > data.num_train_tokens


def test_each_third_is_as_long_as_the_others_on_average(folder: Path) -> None:
    """Both cuts are uniform over the document, and drawn again in every epoch."""
    data = prepare(folder, fill_in_middle_rate=1.0)
    names = (control.FIM_BEGIN, control.FIM_HOLE, control.FIM_END)
    begin, hole, end = (data.tokenizer.control_id(name) for name in names)
    texts = [document.text for document in data.documents("train")]
    thirds, seen = [], set()
    for number in range(8):
        epoch = Epoch(data.row_source, number)
        for index, text in enumerate(texts):
            ids = epoch.document(index).tolist()
            assert (ids[0], ids[-1]) == (begin, data.tokenizer.eos_id)
            prefix, suffix = ids[1 : ids.index(hole)], ids[ids.index(hole) + 1 : ids.index(end)]
            middle = ids[ids.index(end) + 1 : -1]
            assert data.tokenizer.decode(prefix + middle + suffix) == text
            thirds.append([len(part) / (len(ids) - 4) for part in (prefix, suffix, middle)])
        seen.add(tuple(thirds[-1]))
    np.testing.assert_allclose(np.mean(thirds, axis=0), 1 / 3, atol=5 / 18**0.5 / len(thirds) ** 0.5)  # 5 sigma
    assert len(seen) == 8


@pytest.mark.parametrize("shard_count", [2, 4])
def test_shards_together_are_the_one_stream(folder: Path, cache: Path, shard_count: int) -> None:
    whole = prepare(folder, cache, **ALL).train_iterator()
    shards = [
        prepare(folder, cache, shard=(index, shard_count), **ALL).train_iterator() for index in range(shard_count)
    ]
    while epoch_of(whole) < 2:
        tokens, segments = whole.next_rows(3 * shard_count)
        parts = [shard.next_rows(3) for shard in shards]
        for index, (own_tokens, own_segments) in enumerate(parts):
            np.testing.assert_array_equal(own_tokens, tokens[index::shard_count])
            np.testing.assert_array_equal(own_segments, segments[index::shard_count])
        assert {json.dumps(shard.state()) for shard in shards} == {json.dumps(whole.state())}


def test_restarts_change_nothing(folder: Path, cache: Path) -> None:
    """The state passes through JSON at random points; batches and the number of shards differ after each restart."""
    random = np.random.default_rng(3)
    whole = prepare(folder, cache, **ALL).train_iterator()
    state = whole.state()
    while epoch_of(whole) < 2:
        shard_count, batch = int(random.choice([1, 2, 4])), int(random.integers(1, 9))
        tokens, segments = whole.next_rows(batch * shard_count)
        for index in range(shard_count):
            shard = prepare(folder, cache, shard=(index, shard_count), **ALL).train_iterator()
            shard.next_rows(int(random.integers(1, 5)))
            shard.set_state(json.loads(json.dumps(state)))
            own_tokens, own_segments = shard.next_rows(batch)
            np.testing.assert_array_equal(own_tokens, tokens[index::shard_count])
            np.testing.assert_array_equal(own_segments, segments[index::shard_count])
        state = shard.state()
        assert state == whole.state()


@pytest.mark.slow
def test_workers_give_the_same_rows(folder: Path, cache: Path) -> None:
    """Rows are the same also when a signal to the run reaches the workers, and when one of them is killed."""
    whole = prepare(folder, cache, **ALL).train_iterator()
    whole.next_rows(7)
    state = whole.state()
    counts = (30, 150, 145)
    expected = [whole.next_rows(count) for count in counts]
    assert epoch_of(whole) >= 1
    workers = prepare(folder, cache, worker_count=2, **ALL).train_iterator()
    workers.set_state(state)
    first: list[Any] = []
    try:
        for rows, count, number in zip(expected, counts, (signal.SIGINT, signal.SIGTERM, signal.SIGKILL), strict=True):
            for ours, theirs in zip(workers.next_rows(count), rows, strict=True):
                np.testing.assert_array_equal(ours, theirs)
            alive = multiprocessing.active_children()
            first = first or alive
            assert len(alive) == 2
            assert set(alive) == set(first)  # those that met a signal go on
            for process in alive[: 1 if number == signal.SIGKILL else 2]:
                os.kill(process.pid or 0, number)
        for ours, theirs in zip(workers.next_rows(60), whole.next_rows(60), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        assert workers.state() == whole.state()
    finally:
        workers.close()
    assert not multiprocessing.active_children()


def test_workers_that_keep_dying_are_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    iterator = prepare(folder, worker_count=2).train_iterator()
    started = []

    class Dying:
        def __next__(self) -> None:
            raise RuntimeError("Worker process was terminated unexpectedly with exit code -9. Search the logs above")

        def close(self) -> None:
            started.append(self)

    monkeypatch.setattr(iterator, "_open", Dying)
    with pytest.raises(
        UserError, match=r"were killed or ran out of memory 3 times in a row: give a data\.worker_count below 2"
    ):
        iterator.next_rows(1)
    assert len(started) == 3
    assert iterator.state()["rows_taken"] == 0


def test_workers_end_with_a_killed_parent() -> None:
    """Workers hold the pipe of the program's output open, so `run` returns only when they have ended too."""
    program = """
import multiprocessing, os, signal, time
from dsv3_jax.data.worker_processes import live_as_long_as_parent
pool = multiprocessing.get_context("spawn").Pool(1, live_as_long_as_parent, (0, 1))
pool.apply(time.sleep, (0,))
pool.apply_async(time.sleep, (300,))
time.sleep(1)  # until it is at work: an idle one would end anyway
print("working", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "working\n"
    assert done.returncode == -signal.SIGKILL


def test_rows_depend_on_the_seed(folder: Path) -> None:
    one, other, again = (prepare(folder, seed=seed).train_iterator().next_rows(20)[0] for seed in (1, 2, 1))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", 1),
        ("sequence_length", 8),
        ("fill_in_middle_rate", 0.5),
        ("punctuation_split_rate", 0.1),
        ("validation_fraction", 0.2),
    ],
)
def test_a_changed_setting_is_named(folder: Path, name: str, value: Any) -> None:
    state = prepare(folder).train_iterator().state()
    iterator = prepare(folder, **{name: value}).train_iterator()
    with pytest.raises(
        UserError, match=rf"the data changed since the state was saved: data\.{name} was .*, is {value};"
    ):
        iterator.set_state(state)


def test_changed_corpus_and_tokenizer_are_named(folder: Path, tmp_path: Path) -> None:
    state = prepare(folder).train_iterator().state()
    with pytest.raises(UserError, match=r"data\.tokenizer differs;"):
        prepare(folder, tokenizer="train", vocab_size=300).train_iterator().set_state(state)
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    prepare(tmp_path).train_iterator().set_state(state)  # moved is not changed
    (tmp_path / "00.txt").write_text("0 other", encoding="utf-8")
    with pytest.raises(UserError, match=r"data\.corpus differs;"):
        prepare(tmp_path).train_iterator().set_state(state)


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"rows_taken": 3},
        {"rows_taken": -1, "fingerprint": {}},
        {"rows_taken": 1.5, "fingerprint": {}},
        {"rows_taken": 0, "fingerprint": 5},
    ],
)
def test_damaged_state_is_one_line(folder: Path, state: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="state of the data iterator is damaged"):
        prepare(folder).train_iterator().set_state(state)
