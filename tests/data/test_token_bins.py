"""Checks files of ids that other programs write, made here byte by byte as their formats say."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.data import DataConfig, Tokenizer, prepare_data
from dsv3_jax.data.token_bins import is_held_out, read_token_bin
from dsv3_jax.data.tokenizer_training import byte_tokenizer
from dsv3_jax.errors import UserError

TOKENIZER = Tokenizer(byte_tokenizer())
EOS = TOKENIZER.eos_id
DOCUMENTS = [[31, 32, 33], [200, 34], [35] * 40]


def joined(documents: list[list[int]]) -> list[int]:
    return [index for ids in documents for index in (*ids, EOS)]


def modded(ids: list[int], magic: int = 20240520, count: int | None = None) -> bytes:
    header = np.zeros(256, "<i4")
    header[:3] = (magic, 1, len(ids) if count is None else count)
    return header.tobytes() + np.array(ids, "<u2" if magic == 20240520 else "<u4").tobytes()


def megatron(documents: list[list[int]], code: int = 8, dtype: str = "<u2") -> tuple[bytes, bytes]:
    """Returns the .bin and the .idx; every document but the first is stored as two sequences."""
    sequences = [documents[0], *(part for ids in documents[1:] for part in (ids[:1], ids[1:]))]
    sizes = [len(ids) for ids in sequences]
    width = np.dtype(dtype).itemsize
    pointers = np.cumsum([0, *sizes])[:-1] * width
    borders = [0, *range(1, len(sequences) + 1, 2)]
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(sequences), len(borders))
    index += np.array(sizes, "<i4").tobytes() + pointers.astype("<i8").tobytes() + np.array(borders, "<i8").tobytes()
    return np.array([index for ids in sequences for index in ids], dtype).tobytes(), index


def found(file: Path) -> list[list[int]]:
    return [ids.tolist() for ids in read_token_bin(file, TOKENIZER) if len(ids)]


def test_every_form_gives_the_same_documents(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(np.array(joined(DOCUMENTS), "<u2").tobytes())
    (tmp_path / "b.bin").write_bytes(modded(joined(DOCUMENTS)))
    (tmp_path / "c.bin").write_bytes(modded(joined(DOCUMENTS), 20240801))
    for name, code, dtype in (("d", 8, "<u2"), ("e", 4, "<i4")):
        content, index = megatron([[*ids, EOS] for ids in DOCUMENTS], code, dtype)
        (tmp_path / f"{name}.bin").write_bytes(content)
        (tmp_path / f"{name}.idx").write_bytes(index)
    for name in "abcde":
        assert found(tmp_path / f"{name}.bin") == DOCUMENTS, name


@settings(max_examples=30, deadline=None)
@given(ids=st.lists(st.integers(0, 255), max_size=200))
def test_no_id_is_lost(ids: list[int], tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("bins") / "x.bin"
    file.write_bytes(np.array(ids, "<u2").tobytes())
    assert [index for part in found(file) for index in part] == [index for index in ids if index != EOS]


def test_a_file_without_ends_is_cut(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(np.full(150_000, 37, "<u2").tobytes())
    assert [len(ids) for ids in found(tmp_path / "x.bin")] == [65_536, 65_536, 18_928]


@pytest.mark.parametrize(
    ("content", "index", "named"),
    [
        (b"\x30\0\x30", None, "no whole number of 2-byte ids"),
        (modded([1, 2, 3], count=4), None, "no whole number"),
        (np.array([1, 60_000], "<u2").tobytes(), None, "token id 60000 is outside the vocabulary"),
        (b"\1\0", b"something else", "is not an index of Megatron-LM"),
        (b"\1\0", megatron(DOCUMENTS)[1][:-8], "ends early"),
        (b"\1\0", megatron(DOCUMENTS)[1], "is shorter than"),
        (b"\1\0", megatron(DOCUMENTS, code=7)[1], "dtype code 7 is not known"),
    ],
)
def test_a_damaged_file_is_one_line(content: bytes, index: bytes | None, named: str, tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(content)
    if index is not None:
        (tmp_path / "x.idx").write_bytes(index)
    with pytest.raises(UserError, match=named):
        found(tmp_path / "x.bin")


@pytest.mark.parametrize(
    ("name", "held_out"),
    [("val.bin", True), ("fineweb_val_000000.bin", True), ("train.bin", False), ("interval.bin", False)],
)
def test_files_for_validation(name: str, held_out: bool) -> None:
    assert is_held_out(Path(name)) == held_out


@pytest.mark.parametrize("with_validation", [False, True])
def test_a_folder_of_bins_is_a_corpus(with_validation: bool, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    documents = [random.integers(20, 256, 50).tolist() for _ in range(40)]
    (tmp_path / "train.bin").write_bytes(np.array(joined(documents[10:]), "<u2").tobytes())
    name = "val.bin" if with_validation else "more.bin"
    (tmp_path / name).write_bytes(np.array(joined(documents[:10]), "<u2").tobytes())
    (tmp_path / "meta.pkl").write_bytes(b"not read")
    config = DataConfig(corpus=str(tmp_path), tokenizer="byte", sequence_length=32, validation_fraction=0.2)
    data = prepare_data(config, None)
    names = {document.name.split(":")[0] for document in data.documents("validation")}
    assert names == ({"val.bin"} if with_validation else {"train.bin", "more.bin"})
    assert data.store.lengths.sum() == 40 * 50


def test_beside_texts_a_bin_is_something_else(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"\1\0" * 100)
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text(f"{number} some text that is long enough for a row\n")
    config = DataConfig(corpus=str(tmp_path), tokenizer="byte", sequence_length=16, validation_fraction=0.2)
    assert {document.domain for document in prepare_data(config, None).documents()} == {"txt"}
