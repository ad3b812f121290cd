"""Checks tokenised corpora: what is written is read back, and a wrong file gives an error of one line."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from dsv3_jax.data import DataConfig, Tokenizer, prepare_data, read_array_record, write_array_record
from dsv3_jax.data.tokenizer_training import byte_tokenizer, train_bpe
from dsv3_jax.errors import UserError

BYTES = Tokenizer(byte_tokenizer())
TEXTS = [f"{number} text of some length é\n" * 3 for number in range(600)]
DOCUMENTS = [(f"d{number}", "math" if number % 2 else "code", BYTES.encode(text)) for number, text in enumerate(TEXTS)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    target = tmp_path / "corpus" / "a.arrayrecord"
    assert write_array_record(target, iter(DOCUMENTS), BYTES) == len(DOCUMENTS)
    return target


def test_what_is_written_is_read(file: Path) -> None:
    found = [(name, domain, ids.tolist()) for name, domain, ids in read_array_record(file, BYTES)]
    assert found == DOCUMENTS
    assert sorted(path.name for path in file.parent.iterdir()) == ["a.arrayrecord", "a.arrayrecord.json"]


def test_training_on_it_equals_training_on_the_text(file: Path, tmp_path: Path) -> None:
    for corpus in (file, file.parent):
        config = DataConfig(corpus=str(corpus), tokenizer="byte", sequence_length=32)
        data = prepare_data(config, tmp_path / "cache")
        held_out = {document.text for document in data.documents("validation")}
        trained = {document.text for document in data.documents("train")}
        assert held_out | trained == set(TEXTS)
        assert held_out
        assert not held_out & trained
        assert {document.domain for document in data.documents("train")} == {"math", "code"}
        tokens, _ = data.train_iterator().next_rows(4)
        assert tokens.shape == (4, 33)


def test_another_tokenizer_is_refused(file: Path) -> None:
    other = Tokenizer(train_bpe(TEXTS[:20], 300))
    with pytest.raises(UserError, match=r"a\.arrayrecord was tokenised with another tokenizer; set data\.tokenizer"):
        next(read_array_record(file, other))
    with pytest.raises(UserError, match=r"holds token ids; set data\.tokenizer to the tokenizer it was made with"):
        prepare_data(DataConfig(corpus=str(file)), None)


def test_ids_beyond_the_vocabulary(tmp_path: Path) -> None:
    larger, file = Tokenizer(train_bpe(TEXTS[:20], 300)), tmp_path / "a.arrayrecord"
    with pytest.raises(UserError, match=r"document n: token id 266 is outside the tokenizer's vocabulary of 266"):
        write_array_record(file, [("n", "d", [1, 266])], BYTES)
    with pytest.raises(UserError, match="document n: token id -1 is outside"):
        write_array_record(file, [("n", "d", [-1])], BYTES)
    assert not list(tmp_path.iterdir())
    write_array_record(file, [("n", "d", [270])], larger)
    (tmp_path / "a.arrayrecord.json").unlink()  # as files made elsewhere have none
    with pytest.raises(UserError, match=r"a\.arrayrecord, record 0: token id 270 is outside"):
        list(read_array_record(file, BYTES))


@pytest.mark.parametrize("content", [b"", b"not a record file" * 10, None])
def test_damaged_files_are_one_line(content: bytes | None, file: Path) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(UserError, match=r"a\.arrayrecord") as caught:
        list(read_array_record(file, BYTES))
    assert "\n" not in str(caught.value)


def test_every_flipped_byte_is_noticed(file: Path) -> None:
    whole, random = file.read_bytes(), np.random.default_rng(0)
    expected = [(name, domain, ids.tolist()) for name, domain, ids in read_array_record(file, BYTES)]
    for place in random.integers(0, len(whole), 40).tolist():
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(random.integers(8))
        file.write_bytes(damaged)
        with suppress(UserError):
            found = [(name, domain, ids.tolist()) for name, domain, ids in read_array_record(file, BYTES)]
            assert found == expected  # the flip fell into padding


def test_foreign_records_are_named(tmp_path: Path) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    for content, message in ((b"abc", "expected name, domain and 4-byte ids"), (b"\xff\0d\0", "is not UTF-8")):
        writer = ArrayRecordWriter(str(tmp_path / "a.arrayrecord"), "group_size:1")
        writer.write(content)
        writer.close()
        with pytest.raises(UserError, match=rf"a\.arrayrecord, record 0: .*{message}"):
            list(read_array_record(tmp_path / "a.arrayrecord", BYTES))


def test_unwritable_target_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        write_array_record(tmp_path / "file" / "a.arrayrecord", DOCUMENTS, BYTES)
    with pytest.raises(UserError, match="cannot read"):
        list(read_array_record(tmp_path / "absent.arrayrecord", BYTES))
