"""Checks the preparation of data: the split, the validation set, bits per byte, the cache, the default corpus."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv3_jax.data import Data, DataConfig, Tokenizer, prepare_data
from dsv3_jax.data import control_tokens as control
from dsv3_jax.data.splitting import name_hash
from dsv3_jax.data.token_store import TokenStore
from dsv3_jax.data.tokenising import cut_text
from dsv3_jax.data.tokenizer_training import byte_tokenizer, train_bpe
from dsv3_jax.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("corpus")
    random = np.random.default_rng(1)
    for number in range(100):
        words = random.choice(["alpha", "beta();\n", "é", "漢字", "return"], 60)
        file = root / ("code" if number % 3 else "prose") / f"{number:03d}.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"{number} {' '.join(words)}\n", encoding="utf-8")
    return root


def prepare(folder: Path, cache: Path | None = None, **changes: Any) -> Data:
    config = DataConfig(corpus=str(folder), tokenizer="byte", sequence_length=32, validation_fraction=0.1)
    return prepare_data(dataclasses.replace(config, **changes), cache)


def test_split_is_by_document_and_by_name(folder: Path, tmp_path: Path) -> None:
    data = prepare(folder)
    train = {document.name: document for document in data.documents("train")}
    held_out = {document.name: document for document in data.documents("validation")}
    assert 3 <= len(held_out) <= 20
    assert not set(train) & set(held_out)
    texts = {file.relative_to(folder).as_posix(): file.read_text() for file in folder.rglob("*.txt")}
    assert {name: document.text for name, document in (train | held_out).items()} == texts
    assert {document.domain for document in train.values()} == {"code", "prose"}
    # A document stays on its side of the split when it is edited and when others are added or removed.
    for name in [*list(train)[::2], *list(held_out)[::2]]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(texts[name] + "edited")
    smaller = prepare(tmp_path)
    assert {document.name for document in smaller.documents("validation")} == set(list(held_out)[::2])


def test_the_split_is_the_same_on_every_machine() -> None:
    first = hashlib.sha256(b"json/decoder.py").hexdigest()[:12]
    assert name_hash("json/decoder.py") == int(first, 16) / 16**12


def test_tokenizer_is_trained_without_what_is_held_out(tmp_path: Path) -> None:
    for number in range(40):
        name = f"{number}.txt"
        word = "zebra" if name_hash(name) < 0.2 else "alpha"
        (tmp_path / name).write_text(f"{word} " * 20)
    tokenizer = prepare(tmp_path, tokenizer="train", vocab_size=300, validation_fraction=0.2).tokenizer
    assert len(tokenizer.encode(" alpha")) == 1
    assert len(tokenizer.encode(" zebra")) > 3


def test_one_long_file_gives_its_end_to_validation(tmp_path: Path) -> None:
    text = "".join(f"line {number} é\n" for number in range(2000))
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    data = prepare(tmp_path / "book.txt")
    (start,), (end,) = data.documents("train"), data.documents("validation")
    assert start.text + end.text == text
    assert end.text.startswith("line")
    assert 0.08 < len(end.text) / len(text) < 0.1
    assert (start.name, end.name) == ("book.txt", "book.txt#end")


@pytest.mark.parametrize("count", [2, 3, 60])
def test_validation_is_never_left_empty_by_chance(count: int, tmp_path: Path) -> None:
    """Some of a few long documents are held out, whatever the hashes of their names."""
    for seed in range(4):
        folder = tmp_path / str(seed)
        folder.mkdir()
        for number in range(count):
            (folder / f"{seed}-{number}.txt").write_text("x" * 50)
        data = prepare(folder, validation_fraction=0.02, sequence_length=40)
        assert len(data.validation_rows()[0]) >= 1
        assert data.num_train_tokens >= 41


def test_long_texts_are_cut_without_changing_their_tokens() -> None:
    text = "".join(f"def f{number}(x):\n    return x;\n\n" for number in range(300))
    tokenizer = Tokenizer(train_bpe([text], 400))
    for size in (10, 64, 1000):
        pieces = cut_text(text, size)
        assert "".join(pieces) == text
        assert len(pieces) > 3
        assert max(map(len, pieces)) <= 2 * size
        whole_lines = all(piece.startswith("def") for piece in pieces)
        assert whole_lines == (size > 10)
        if whole_lines:
            assert [index for piece in pieces for index in tokenizer.encode(piece)] == tokenizer.encode(text)
    assert cut_text("") == [""]
    assert "".join(cut_text("x" * 1001, 10)) == "x" * 1001


def test_validation_rows_are_fixed_full_and_spread(folder: Path) -> None:
    data = prepare(folder)
    stream, owner = [], []
    for number, document in enumerate(data.documents("validation")):
        ids = [*data.tokenizer.encode(document.text), data.tokenizer.eos_id]
        stream += ids
        owner += [number] * len(ids)
    every, segments = data.validation_rows()
    full = (len(stream) - 1) // 32
    assert len(every) == min(full, 64)
    few, _ = prepare(folder, validation_sequences=5, seed=9, fill_in_middle_rate=1.0).validation_rows()
    places = [index * full // 5 for index in range(5)]
    assert few.tolist() == [stream[32 * place : 32 * place + 33] for place in places]
    places = [index * full // len(every) for index in range(len(every))]
    assert segments.tolist() == [
        [1 + number - owner[32 * place] for number in owner[32 * place : 32 * place + 33]] for place in places
    ]


def test_the_baselines_are_those_of_the_validation_text(folder: Path) -> None:
    data = prepare(folder, tokenizer="train", vocab_size=300)
    tokens, _ = data.validation_rows()
    targets = tokens[:, 1:].ravel()
    text = data.tokenizer.to_bytes([index for index in targets if index != data.tokenizer.eos_id])
    assert data.tokenizer.token_bytes[targets].sum() == len(text)
    counts = Counter(text)
    entropy = -sum(count / len(text) * math.log2(count / len(text)) for count in counts.values())
    assert data.validation_entropy_bits_per_byte == pytest.approx(entropy, rel=1e-12)
    assert data.validation_gzip_bits_per_byte == 8 * len(gzip.compress(text, 9)) / len(text)


def test_cache_is_used_complete_and_by_content(folder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    config = DataConfig(corpus=str(folder), vocab_size=300, sequence_length=32, validation_fraction=0.1)
    first = prepare_data(config, tmp_path, progress=said.append)
    assert [line.split()[0] for line in said] == ["training", "tokenising", "read"]
    second = prepare_data(config, tmp_path, progress=said.append)
    assert len(said) == 3
    assert second.fingerprint == first.fingerprint
    assert second.fingerprint == prepare_data(config, None).fingerprint
    rows = first.train_iterator().next_rows(50)
    for again in (second, prepare_data(config, None)):
        for ours, theirs in zip(rows, again.train_iterator().next_rows(50), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert sorted(path.name.split("-")[0] for path in tmp_path.iterdir()) == ["tokenizer", "tokens"]


def test_cache_is_of_one_corpus_and_one_tokenizer(folder: Path, tmp_path: Path) -> None:
    """The result is that of an empty folder, whatever was prepared in the folder before."""
    other = tmp_path / "other"
    for file in sorted(folder.rglob("*.txt")):
        (other / file.parent.name).mkdir(parents=True, exist_ok=True)
        (other / file.parent.name / file.name).write_text(file.read_text() + "more")
    for corpus in (folder, other):
        for changes in ({"tokenizer": "byte"}, {"vocab_size": 300}, {"vocab_size": 310}, {"validation_fraction": 0.2}):
            changes = {"tokenizer": "train", "vocab_size": 300, **changes}
            fresh, cached = prepare(corpus, **changes), prepare(corpus, tmp_path / "cache", **changes)
            assert cached.tokenizer.fingerprint == fresh.tokenizer.fingerprint
            np.testing.assert_array_equal(cached.store.tokens, fresh.store.tokens)
            np.testing.assert_array_equal(cached.validation_rows()[0], fresh.validation_rows()[0])


@pytest.mark.parametrize("vocab_size", [2**16, 2**16 + 1])
def test_store_holds_every_id(vocab_size: int, tmp_path: Path) -> None:
    ids = np.array([0, vocab_size - 1])
    store = TokenStore.build([("name", "domain", False, ids), ("empty", "domain", True, ids[:0])], vocab_size)
    for kept in (store, store.save(tmp_path / "store")):
        assert kept.document(0).tolist() == ids.tolist()
        assert (kept.names, kept.domains, kept.held_out.tolist()) == (["name"], ["domain"], [False])
        assert kept.tokens.itemsize == (2 if vocab_size <= 2**16 else 4)


@pytest.mark.parametrize("damage", ["flipped", "short", "missing"])
def test_damaged_cache_is_built_again(folder: Path, tmp_path: Path, damage: str) -> None:
    rows = prepare(folder, tmp_path).train_iterator().next_rows(20)[0]
    (cached,) = tmp_path.iterdir()
    tokens = cached / "tokens.npy"
    content = bytearray(tokens.read_bytes())
    content[-7] ^= 1
    if damage == "missing":
        tokens.unlink()
    else:
        tokens.write_bytes(content if damage == "flipped" else content[:-100])
    assert TokenStore.load(cached) is None
    np.testing.assert_array_equal(prepare(folder, tmp_path).train_iterator().next_rows(20)[0], rows)
    assert TokenStore.load(cached) is not None
    assert list(tmp_path.iterdir()) == [cached]


def test_unwritable_cache_is_one_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write the tokenised corpus to") as caught:
        prepare(folder, tmp_path / "file")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot write the tokenizer to"):
        prepare(folder, tmp_path / "file", tokenizer="train", vocab_size=300)


def test_a_runs_own_tokenizer_wins(folder: Path, tmp_path: Path) -> None:
    own = Tokenizer(byte_tokenizer())
    own.save(tmp_path / "tokenizer")
    config = DataConfig(corpus=str(folder), vocab_size=300, sequence_length=32, validation_fraction=0.1)
    data = prepare_data(config, None, tokenizer=own)
    assert data.tokenizer.fingerprint == own.fingerprint
    named = prepare(folder, tokenizer=str(tmp_path / "tokenizer/tokenizer.json"))
    assert named.tokenizer.fingerprint == own.fingerprint
    shutil.rmtree(tmp_path / "tokenizer")
    with pytest.raises(UserError, match="cannot read"):
        prepare(folder, tokenizer=str(tmp_path / "tokenizer/tokenizer.json"))


@pytest.mark.slow
def test_default_corpus_end_to_end() -> None:
    data = prepare_data(DataConfig(sequence_length=128), None)
    assert data.tokenizer.vocab_size == 4096
    assert data.num_train_tokens > 1_000_000
    assert 3.0 < data.tokenizer.token_bytes[data.validation_rows()[0][:, 1:]].mean() < 4.5
    assert 4.0 < data.validation_entropy_bits_per_byte < 5.5
    assert 1.5 < data.validation_gzip_bits_per_byte < 3.5
    tokens, segments = data.train_iterator().next_rows(3000)
    assert tokens.shape == segments.shape == (3000, 129)
    assert (segments > 0).all()
    assert (tokens == data.tokenizer.control_id(control.FIM_BEGIN)).any()
    names = {document.name.split("/")[0] for document in data.documents("validation")}
    assert len(names) >= 3


def test_validation_rows_of_a_published_model_begin_with_its_token(folder: Path):
    """Each row holds the same tokens but the last, so every token of the held-out text is a target exactly once."""
    data = prepare(folder, validation_sequences=1000)
    tokens, segments = data.validation_rows()
    begun, begun_segments = dataclasses.replace(data, begins_rows=True).validation_rows()
    assert (begun[:, 0] == data.tokenizer.bos_id).all()
    np.testing.assert_array_equal(begun[:, 1:], tokens[:, :-1])
    np.testing.assert_array_equal(begun_segments[:, 1:], segments[:, :-1])
    assert begun.shape == tokens.shape
    targets = begun[:, 1:].ravel()
    wanted = np.concatenate(
        [[*data.tokenizer.encode(d.text), data.tokenizer.eos_id] for d in data.documents("validation")]
    )
    np.testing.assert_array_equal(targets, wanted[: targets.size])
