"""Checks preference pairs as data: which two texts a pair is, how pairs fill rows, and what cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dsv3_jax.data import Data, DataConfig, prepare_data
from dsv3_jax.errors import UserError


def prepare(path: Path, *rows: dict, **changes) -> Data:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    values = {"sequence_length": 40, "tokenizer": "byte", "validation_fraction": 1e-6}
    return prepare_data(DataConfig(form="preferences", corpus=str(path), **(values | changes)), path.parent / "cache")


def pairs_in(data: Data, rows: list[tuple[np.ndarray, np.ndarray]]) -> list[tuple[str, str]]:
    found = []
    for tokens, segment_ids in rows:
        ids = np.abs(segment_ids)
        assert ids[-1] == 0, "the score of the last token could not be read"
        assert ids.max() % 2 == 0
        texts = [data.tokenizer.decode(tokens[ids == number]) for number in range(1, ids.max() + 1)]
        found += zip(texts[::2], texts[1::2], strict=True)
    return found


END = "<｜end▁of▁sentence｜>"


def test_rows_hold_whole_pairs_the_chosen_answer_first(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}?", "chosen": f"yes{n}", "rejected": "no" * (n % 3)} for n in range(1, 18) if n % 3]
    data = prepare(tmp_path / "pairs.jsonl", *rows, validation_fraction=0.3)
    epoch = data.row_source.epoch(0)
    training = pairs_in(data, [epoch.row(index) for index in range(epoch.row_count)])
    held_out = pairs_in(data, list(zip(*data.validation_rows(), strict=True)))
    wanted = [tuple(f"{r['prompt']}{r[name]}{END}" for name in ("chosen", "rejected")) for r in rows]
    assert sorted(training + held_out) == sorted(wanted)
    assert held_out
    assert epoch.row_count < len(training), "some rows hold more than one pair"


def test_conversations_are_pairs_too(tmp_path: Path) -> None:
    question = {"role": "user", "content": "2 + 3?"}
    answers = [{"role": "assistant", "content": text} for text in ("5", "6")]
    row = {"chosen": [question, answers[0]], "rejected": [question, answers[1]]}
    split = {"prompt": [question], "chosen": [answers[0]], "rejected": [answers[1]]}
    data = prepare(tmp_path / "pairs.jsonl", row, split, sequence_length=80)
    held_out, training = (pairs_in(data, rows) for rows in (
        list(zip(*data.validation_rows(), strict=True)), [data.row_source.epoch(0).row(0)]
    ))  # fmt: skip
    assert held_out == training
    assert [text.endswith(f"{n}{END}") for text, n in zip(training[0], "56", strict=True)] == [True, True]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "needs a field 'rejected'"),
        ({"prompt": "a", "completion": "b"}, "needs a field 'chosen'"),
        ({"prompt": "a", "chosen": "b", "rejected": 3}, "rejected must be a string"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "empty turn.*--drop-empty-turns"),
        ({"prompt": "a" * 20, "chosen": "b", "rejected": "c"}, r"too long \(more than 40 tokens\).*--drop-overlong"),
    ],
)
def test_what_is_no_pair(tmp_path: Path, row: dict, message: str) -> None:
    good = {"prompt": "1?", "chosen": "2", "rejected": "3"}
    with pytest.raises(UserError, match=message):
        prepare(tmp_path / "pairs.jsonl", good, good, row)
