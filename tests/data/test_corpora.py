"""Checks that every kind of corpus is read, and that one which cannot be used gives an error of one line."""

from __future__ import annotations

import bz2
import codecs
import dataclasses
import gzip
import json
import lzma
import os
import re
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from dsv3_jax.data import DataConfig, Document, prepare_data
from dsv3_jax.data.corpus import Corpus, open_corpus
from dsv3_jax.errors import ConfigError, UserError


def documents(corpus: Path | str) -> list[Document]:
    return list(open_corpus(DataConfig(corpus=str(corpus))).documents())


def write_parquet(file: Path, **columns: Any) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), file)


@pytest.fixture(scope="module")
def stdlib() -> Corpus:
    return open_corpus(DataConfig())


def test_standard_library(stdlib: Corpus) -> None:
    found = {document.name: document for document in stdlib.documents()}
    assert {"json/decoder.py", "heapq.py", "asyncio/tasks.py"} <= set(found)
    assert found["json/decoder.py"].domain == "json"
    assert found["heapq.py"].text.startswith('"""Heap queue')
    assert not [name for name in found if "site-packages" in name or "/test/" in name or not name.endswith(".py")]
    assert not [name for name in found if name.startswith(("_sysconfigdata", "config-", "tkinter", "sitecustomize"))]
    assert not [name for name, document in found.items() if str(stdlib.root) in document.text]
    assert list(found) == sorted(found)
    assert sum(len(document.text) for document in found.values()) > 3_000_000
    assert stdlib.document_count() == len(found)


def test_folder_of_files(tmp_path: Path) -> None:
    (tmp_path / "src/deep").mkdir(parents=True)
    (tmp_path / "src/deep/b.py").write_bytes("x = 'é'\r\n".encode())
    (tmp_path / "src/a.py").write_text("a")
    (tmp_path / "notes.md").write_text("n")
    (tmp_path / "picture.PNG").write_bytes(b"\xff\xfe")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git/config").write_bytes(b"\xff")
    assert documents(tmp_path) == [
        Document("notes.md", "md", "n"),
        Document("src/a.py", "src", "a"),
        Document("src/deep/b.py", "src", "x = 'é'\r\n"),
    ]
    assert documents(tmp_path / "notes.md") == [Document("notes.md", "md", "n")]


def test_names_need_not_be_utf8_and_pipes_are_passed_over(tmp_path: Path) -> None:
    with open(os.fsencode(tmp_path) + b"/caf\xe9.txt", "w") as file:
        file.write("text of a name " * 20)
    os.mkfifo(tmp_path / "pipe.txt")
    assert [document.text[:7] for document in documents(tmp_path)] == ["text of"]
    config = DataConfig(corpus=str(tmp_path), vocab_size=300, sequence_length=8, validation_fraction=0.4)
    for _ in range(2):
        data = prepare_data(config, tmp_path / ".cache")
        assert sum(len(document.text) for split in ("train", "validation") for document in data.documents(split)) == 300
    with pytest.raises(UserError, match="is neither a file nor a folder"):
        documents(tmp_path / "pipe.txt")


def test_jsonl(tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "a\\u2028é"}\n\n{"text": "b", "domain": "math", "n": 1}\n', encoding="utf-8")
    assert documents(file) == [
        Document("texts.jsonl:1", "jsonl", "a\u2028é"),
        Document("texts.jsonl:3", "math", "b"),
    ]
    assert open_corpus(DataConfig(corpus=str(file))).document_count() == 2


def test_parquet(tmp_path: Path) -> None:
    file = tmp_path / "texts.parquet"
    write_parquet(file, text=[f"é{row}" for row in range(600)], domain=["math", None] * 300, other=[0.5] * 600)
    found = documents(file)
    assert [document.text for document in found] == [f"é{row}" for row in range(600)]
    assert [document.domain for document in found[:2]] == ["math", "parquet"]
    assert len({document.name for document in found}) == 600
    assert open_corpus(DataConfig(corpus=str(file))).document_count() == 600


def test_fingerprint_follows_names_and_contents(tmp_path: Path) -> None:
    def fingerprint() -> str:
        return open_corpus(DataConfig(corpus=str(tmp_path))).fingerprint()

    (tmp_path / "a.txt").write_text("one")
    first = fingerprint()
    assert fingerprint() == first
    (tmp_path / "a.txt").write_text("two")
    second = fingerprint()
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    assert len({first, second, fingerprint()}) == 3


def test_not_utf8_names_file_and_byte(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("é" * 10)
    (tmp_path / "bad.txt").write_bytes("é€".encode() + b"\xff tail")
    with pytest.raises(UserError, match=r"bad\.txt is not UTF-8 at byte 5 \(0xff\)"):
        documents(tmp_path)


def test_not_utf8_in_jsonl_counts_bytes_of_the_file(tmp_path: Path) -> None:
    good = '{"text": "é"}\n'.encode()
    (tmp_path / "a.jsonl").write_bytes(good + b'{"text": "\xe9"}\n')
    with pytest.raises(UserError, match=rf"a\.jsonl is not UTF-8 at byte {len(good) + 10} \(0xe9\)"):
        documents(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "a.jsonl, line 2: not JSON"),
        ("[" * 100_000, "a.jsonl, line 2: not JSON"),
        ("3", "a.jsonl, line 2: expected an object with a field 'text'"),
        ('{"txt": "a"}', "a.jsonl, line 2: expected a field 'text' that holds a string; the fields are 'txt'"),
        ("{}", "a.jsonl, line 2: expected a field 'text' that holds a string; the fields are none"),
        ('{"text": 3}', "a.jsonl, line 2: expected a field 'text' that holds a string, not int"),
        ('{"text": "a\\ud800"}', "a.jsonl, line 2: character 1 is a lone surrogate"),
    ],
)
def test_bad_jsonl_names_the_line(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' + line)
    with pytest.raises(UserError, match=message) as caught:
        documents(tmp_path)
    assert "\n" not in str(caught.value)


def test_bad_parquet_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    file.write_bytes(b"PAR1 nothing like it")
    with pytest.raises(UserError, match=r"a\.parquet is not a Parquet file") as caught:
        documents(file)
    assert "\n" not in str(caught.value)
    write_parquet(file, words=["a"])
    with pytest.raises(UserError, match=r"a\.parquet has no column 'text'; its columns are words"):
        documents(file)
    write_parquet(file, data=[{"text": "a"}])
    with pytest.raises(UserError, match=r"a\.parquet has no column 'text'; its columns are data\.text"):
        documents(file)
    write_parquet(file, text=[["a"]])
    with pytest.raises(UserError, match=r"a\.parquet, row 1: expected a field 'text' that holds a string, not list"):
        documents(file)
    write_parquet(file, text=[str(row) * 50 for row in range(100)])
    raw = bytearray(file.read_bytes())
    raw[4:40] = bytes(36)
    file.write_bytes(raw)
    with pytest.raises(UserError, match=r"a\.parquet") as caught:
        documents(file)
    assert "\n" not in str(caught.value)


def test_absent_empty_and_mixed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the corpus .*/nowhere does not exist; give 'stdlib' or the path"):
        documents(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"the corpus .* is empty: it holds no text file"):
        documents(tmp_path)
    (tmp_path / "a.txt").touch()
    with pytest.raises(UserError, match=r"the corpus .* is empty; its files hold no text"):
        prepare_data(DataConfig(corpus=str(tmp_path), tokenizer="byte"), None)
    (tmp_path / "b.arrayrecord").touch()
    with pytest.raises(UserError, match=r"mixes \.arrayrecord files with text files"):
        documents(tmp_path)


def test_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    with pytest.raises(UserError, match=r"cannot read .*loop\.txt: Too many levels of symbolic links"):
        documents(tmp_path)
    if os.geteuid():  # root reads everything
        (tmp_path / "loop.txt").unlink()
        (tmp_path / "locked.txt").write_text("a")
        (tmp_path / "locked.txt").chmod(0)
        with pytest.raises(UserError, match=r"cannot read .*locked\.txt: Permission denied"):
            documents(tmp_path)


@pytest.mark.parametrize("length", [64, 200])
def test_too_small_for_one_sequence(length: int, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 100)
    config = DataConfig(corpus=str(tmp_path), tokenizer="byte", sequence_length=length, validation_fraction=0.5)
    with pytest.raises(UserError, match=f"too small: its 51 training tokens do not fill one sequence of {length}"):
        prepare_data(config, None)
    few = DataConfig(corpus=str(tmp_path), tokenizer="byte", sequence_length=32, validation_fraction=0.02)
    with pytest.raises(UserError, match="too small: its 3 validation tokens do not fill one sequence of 32"):
        prepare_data(few, None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("corpus", ""),
        ("tokenizer", ""),
        ("null_texts", "keep"),
        ("vocab_size", 0),
        ("sequence_length", 0),
        ("sequence_length", True),
        ("seed", -1),
        ("worker_count", 1.0),
        ("validation_sequences", 0),
        ("fill_in_middle_rate", 1.5),
        ("fill_in_middle_rate", float("nan")),
        ("punctuation_split_rate", -0.1),
        ("validation_fraction", 0.0),
        ("validation_fraction", 0.9),
    ],
)
def test_bad_settings_name_the_field(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^data\.{field} ") as caught:
        DataConfig(**{field: value})
    assert "\n" not in str(caught.value)


def test_jsonl_text_is_json_safe(tmp_path: Path) -> None:
    texts = ["\u2028 \x0b \x85", "a\r\nb", "\0"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert [document.text for document in documents(tmp_path)] == texts


COMPRESS = {
    "": lambda raw: raw,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda raw: zstd(raw),
}


def zstd(raw: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(raw)
    return sink.getvalue().to_pybytes()


COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("name", ["a.jsonl", "b.ndjson", "C4.00000.JSON", "d.JSONL", "e.txt", "f.md"])
def test_names_and_compressions_of_texts(name: str, compression: str, tmp_path: Path) -> None:
    """Files compressed in two parts are common: shards are joined by `cat`."""
    texts = ["né\n", "zwei \u2028", "x" * 100_000]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    raw = ["".join(lines[:2]), lines[2]] if "." + name.split(".")[-1].lower() not in (".txt", ".md") else texts[:2]
    file = tmp_path / (name + compression)
    file.write_bytes(b"".join(COMPRESS[compression](part.encode()) for part in raw))
    expected = texts if "json" in name.lower() else ["".join(raw)]
    assert [document.text for document in documents(tmp_path)] == expected
    assert open_corpus(DataConfig(corpus=str(file))).document_count() == len(expected)


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_byte_order_mark_is_no_text(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(codecs.BOM_UTF8 + (b'{"text": "pears"}\n' if "jsonl" in name else b"pears"))
    assert [document.text for document in documents(tmp_path)] == ["pears"]


@pytest.mark.parametrize(
    "content", ['{"name": "left-pad"}', '[{"text": "a"}]', '{\n"text": "a"}', "", "[" * 100_000, "{"]
)
def test_json_that_is_not_lines_is_one_text(content: str, tmp_path: Path) -> None:
    (tmp_path / "package.json").write_text(content)
    assert [document.text for document in documents(tmp_path)] == [content]


def test_lines_read_as_lines_have_another_fingerprint(tmp_path: Path) -> None:
    """Runs of before, which read the same file as one text, are not resumed on other rows."""
    (tmp_path / "a.json").write_text('{"text": "a"}')
    corpus = open_corpus(DataConfig(corpus=str(tmp_path)))
    (kind,) = corpus.files.values()
    as_text = {file: dataclasses.replace(kind, form="text") for file in corpus.files}
    assert corpus.fingerprint() != dataclasses.replace(corpus, files=as_text).fingerprint()


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.txt.gz", "a.txt.zst", "a.txt.xz", "a.txt.bz2"])
@pytest.mark.parametrize("damage", ["cut", "not compressed"])
def test_damaged_compression_is_one_line(name: str, damage: str, tmp_path: Path) -> None:
    whole = COMPRESS["." + name.rsplit(".", 1)[1]](b'{"text": "a"}\n' * 1000)
    (tmp_path / name).write_bytes(whole[:-9] if damage == "cut" else b"plain text")
    with pytest.raises(UserError, match=rf"cannot read .*{re.escape(name)}: \w") as caught:
        documents(tmp_path)
    assert "\n" not in str(caught.value)


def test_what_was_read_and_what_was_not_is_said(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    for folder in (".git", "node_modules", "real"):
        (corpus / folder).mkdir(parents=True)
    (corpus / "link").symlink_to(tmp_path)
    (corpus / "a.md").write_text("how this was made " * 30)
    with gzip.open(corpus / "real/shard.jsonl.gz", "wt") as file:
        file.write(
            "".join(json.dumps({"text": f"document {row}"}) + "\n" for row in range(50)) + '{"text": null}\n' * 2
        )
    for name in (".hidden", "a.png", "b.png", "c.tar.gz", "d.gz", "e.zip"):
        (corpus / name).write_bytes(b"\xff")
    os.mkfifo(corpus / "pipe")
    said: list[str] = []
    config = DataConfig(corpus=str(corpus), tokenizer="byte", sequence_length=16, fill_in_middle_rate=0.0)
    prepare_data(config, None, progress=said.append)
    assert said == [
        f"tokenising the corpus {corpus}",
        "read 1 .jsonl.gz file (a document per line): 50 documents, 540 characters",
        "read 1 .md file (a document per file): 1 document, 540 characters",
        "not read: .gz: an archive: unpack it: c.tar.gz",
        "not read: .gz: compressed, and its name does not say that it is text (.txt, .md) or JSON lines (.jsonl): d.gz",
        "not read: .png: not text: a.png and 1 more",
        "not read: .zip: an archive: unpack it: e.zip",
        "not read: folders of programs: node_modules",
        "not read: folders that are links: link",
        "not read: hidden files: .hidden",
        "not read: hidden folders: .git",
        "not read: no regular files: pipe",
        f"not read: 2 rows whose text is null, the first in {corpus / 'real/shard.jsonl.gz'}, line 51",
    ]


def test_null_texts_are_passed_over_in_parquet_too(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", text=["a", None, "b"])
    assert documents(tmp_path) == [Document("a.parquet:1", "parquet", "a"), Document("a.parquet:3", "parquet", "b")]
    with pytest.raises(UserError, match=r"a\.parquet, row 2: the text is null"):
        list(open_corpus(DataConfig(corpus=str(tmp_path), null_texts="refuse")).documents())


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(b"a"))
    with pytest.raises(UserError, match=r"a\.tar\.gz cannot be read: it is an archive: unpack it"):
        documents(tmp_path / "a.tar.gz")
    with pytest.raises(UserError, match=r"is empty: it holds no text file \(\.gz: an archive: unpack it: a\.tar\.gz\)"):
        documents(tmp_path)
