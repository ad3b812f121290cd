"""Checks samples to fine-tune on: forms, which tokens are learned, what cannot be used, and how rows are packed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_jax.data import Data, DataConfig, prepare_data
from dsv3_jax.data.best_fit import best_fit
from dsv3_jax.data.conversation import read_sample
from dsv3_jax.data.document_files import FileRow
from dsv3_jax.errors import ConfigError, UserError

CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "2 + 3?"},
    {"role": "assistant", "content": "5"},
    {"role": "user", "content": "<｜Assistant｜> Sure?"},
    {"role": "assistant", "content": "<think>2 + 3</think>Yes."},
]
END = "<｜end▁of▁sentence｜>"


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def prepare(path: Path, lines: list[str] | None = None, **changes) -> Data:
    values = {"sequence_length": 127, "tokenizer": "byte", "validation_fraction": 1e-6}
    config = DataConfig(form="conversations", corpus=str(path), **(values | changes))
    return prepare_data(config, path.parent / "cache", progress=lines.append if lines is not None else None)


def learned_texts(data: Data) -> set[tuple[str, ...]]:
    """Returns the texts that are learned, of each sample of the training rows of the first epoch."""
    source, found = data.row_source.epoch(0), set()
    for index in range(source.row_count):
        tokens, ids = source.row(index)
        for sample in range(1, abs(ids).max() + 1):
            starts = np.flatnonzero(np.diff((ids == sample).astype(int), prepend=0) == 1)
            stops = np.flatnonzero(np.diff((ids == sample).astype(int), append=0) == -1) + 1
            parts = zip(starts, stops, strict=True)
            found.add(tuple(data.tokenizer.decode(tokens[start:stop]) for start, stop in parts))
    return found


OTHER = {"text": "held out"}


@pytest.mark.parametrize(
    ("row", "loss_on", "expected"),
    [
        ({"messages": CHAT}, "assistant", (f"5{END}", f"<think>2 + 3</think>Yes.{END}")),
        ({"messages": CHAT}, "last", (f"<think>2 + 3</think>Yes.{END}",)),
        ({"prompt": CHAT[:4], "completion": CHAT[4:]}, "assistant", (f"<think>2 + 3</think>Yes.{END}",)),
        ({"prompt": "2 + 3 = ", "completion": "5"}, "assistant", (f"5{END}",)),
        ({"prompt": "2 + 3 = ", "completion": "5", "cut": True, "reward": 0.0}, "assistant", ("5",)),
        ({"prompt": "2 + 3 = ", "completion": "5"}, "all", (f"2 + 3 = 5{END}",)),
        ({"text": "2 + 3 = 5"}, "assistant", (f"2 + 3 = 5{END}",)),
    ],
)
def test_only_what_is_asked_for_is_learned(tmp_path: Path, row: dict, loss_on: str, expected: tuple[str, ...]):
    rows = [{"rejected": "2 + 3"}, row, row, OTHER]
    data = prepare(write(tmp_path / "chats.jsonl", *rows), loss_on=loss_on)
    assert expected in learned_texts(data)
    assert learned_texts(data) <= {expected, (f"held out{END}",)}


def test_control_tokens_in_what_users_say_are_text(tmp_path: Path):
    data = prepare(write(tmp_path / "chats.jsonl", {"messages": CHAT}, {"messages": CHAT}))
    tokens, _ = data.row_source.epoch(0).row(0)
    names = [
        data.tokenizer.decode([token]) for token in tokens if token >= 256 or not data.tokenizer.token_bytes[token]
    ]
    assert names.count("<｜Assistant｜>") == names.count("<｜User｜>") == 2
    assert names.count("<think>") == 1
    assert [document.text.count("Be short.") for document in data.documents("validation")] == [1]


def test_parquet_and_folders_give_the_same_rows_as_json_lines(tmp_path: Path):
    rows = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}]}
        for n in range(9)
    ]
    folder = tmp_path / "folder"
    folder.mkdir()
    parquet.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    (folder / "README.md").write_text("Chats.", encoding="utf-8")
    lines: list[str] = []
    found = learned_texts(prepare(folder, lines))
    assert found <= learned_texts(prepare(write(tmp_path / "a.jsonl", *rows))) | {(f"{n}!{END}",) for n in range(9)}
    assert len(found) == 8
    assert any("README.md" in line for line in lines)


@pytest.mark.parametrize(
    ("bad", "problem", "option"),
    [
        ({"messages": [{"role": "tool", "content": "x"}, CHAT[2]]}, "unknown role", "drop_unknown_roles"),
        ({"messages": [{"role": "user", "content": " "}, CHAT[2]]}, "empty turn", "drop_empty_turns"),
        ({"prompt": "x", "completion": ""}, "empty turn", "drop_empty_turns"),
        ({"messages": CHAT[:2]}, "nothing to learn", "drop_without_target"),
        ({"text": "x" * 200}, "too long", "drop_overlong"),
    ],
)
def test_what_cannot_be_used_is_an_error_or_counted(tmp_path: Path, bad: dict, problem: str, option: str):
    path = write(tmp_path / "chats.jsonl", {"text": "a"}, bad, {"text": "b"}, bad)
    with pytest.raises(UserError, match=rf"line 2.*{problem}.*2 of 4 samples.*--{option.replace('_', '-')}"):
        prepare(path)
    lines: list[str] = []
    assert len(prepare(path, lines, **{option: True}).store) == 2
    assert any(f"2 samples ({problem})" in line for line in lines)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "hello"}, "line 1: messages must be a list"),
        ({"messages": [{"role": "user"}]}, "content of message 1 must be a string, not null"),
        ({"messages": ["hello"]}, "message 1 must be an object"),
        ({"prompt": "x"}, "without a field 'completion'"),
        ({"prompt": "x", "completion": 3}, "completion must be a string, not int"),
        ({"chosen": "x", "rejected": "y"}, "chosen must be a list of objects"),
        ({"question": "x"}, "expected a field 'messages', 'prompt' or 'text'; the fields are 'question'"),
        ({"text": "\ud800"}, "lone surrogate"),
    ],
)
def test_malformed_rows_are_one_line_with_the_place(tmp_path: Path, row: dict, message: str):
    with pytest.raises(UserError, match=message):
        prepare(write(tmp_path / "chats.jsonl", row, OTHER))


def test_few_samples_and_untrained_tokenizers_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match="1 samples that can be used"):
        prepare(write(tmp_path / "chats.jsonl", OTHER))
    with pytest.raises(ConfigError, match="tokenizer is train"):
        DataConfig(form="conversations", corpus="x")


@pytest.mark.parametrize("whole", [False, True])
def test_the_chosen_answer_of_a_preference_pair_is_learned(whole: bool):
    question, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    other = answer | {"content": "b"}
    values = {"chosen": [question, answer], "rejected": [question, other]} if whole else None
    pair = read_sample(FileRow(1, "f, line 1", values or {"prompt": "q", "chosen": "a", "rejected": "b"}))
    alone = read_sample(
        FileRow(1, "f, line 1", {"messages": [question, answer]} if whole else {"prompt": "q", "completion": "a"})
    )
    assert pair == alone is not None


@given(st.lists(st.integers(1, 20), max_size=40), st.integers(20, 30))
def test_best_fit_is_that_of_a_plain_search(lengths: list[int], space: int):
    rows: list[list[int]] = []
    for sample, length in enumerate(lengths):
        left = [space - sum(lengths[each] for each in row) for row in rows]
        fitting = [index for index in range(len(rows)) if left[index] >= length]
        if fitting:
            rows[min(fitting, key=lambda index: (left[index], index))].append(sample)
        else:
            rows.append([sample])
    assert best_fit(lengths, space) == rows


def test_every_epoch_has_every_sample_once_in_another_order(tmp_path: Path):
    rows = [{"text": f"{number:03d}" * (1 + number % 7)} for number in range(50)]
    data = prepare(write(tmp_path / "texts.jsonl", *rows), sequence_length=31, seed=3)
    epochs = []
    for number in range(2):
        epoch = data.row_source.epoch(number)
        tokens, ids = zip(*(epoch.row(index) for index in range(epoch.row_count)), strict=True)
        epochs.append(np.concatenate([row[row_ids > 0] for row, row_ids in zip(tokens, ids, strict=True)]))
    texts = [sorted(data.tokenizer.decode(epoch).split(END)) for epoch in epochs]
    assert texts[0] == texts[1]
    assert len(texts[0]) == 50  # one text is held out, and what follows the last end is empty
    assert epochs[0].tolist() != epochs[1].tolist()
    assert data.rows_of(2.0) == data.row_source.epoch(0).row_count + data.row_source.epoch(1).row_count
