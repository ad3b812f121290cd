"""Checks that tokenizers decode what they encoded, count bytes exactly, and refuse bad files with one line."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.data import Tokenizer
from dsv3_jax.data import control_tokens as control
from dsv3_jax.data.control_tokens import LEADING, TRAILING
from dsv3_jax.data.punctuation_splitting import PunctuationSplitting
from dsv3_jax.data.tokenizer_training import SMALLEST_VOCABULARY, byte_tokenizer, sample_text, train_bpe
from dsv3_jax.data.tokenizer_trial import try_tokenizer
from dsv3_jax.errors import ConfigError, UserError

PUBLISHED = Path(__file__).resolve().parents[3] / "shared/published/deepseek-r1/tokenizer.json.gz"
CODE = ['def run(self):\n    return {"a": 1234567, "b": [x for x in range(10)]};\n\n# 漢字と仮名 done.\n'] * 20
UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
MIXED = st.text(st.sampled_from("ab é漢𝄞\u0301 \n\r\t.,;{}()<｜▁think>123\0"), max_size=60)


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return Tokenizer(train_bpe(CODE, 400))


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    return Tokenizer(byte_tokenizer())


@settings(max_examples=150, deadline=None)
@given(text=UNICODE | MIXED)
def test_any_text_comes_back_and_its_bytes_are_counted(trained: Tokenizer, byte_level: Tokenizer, text: str) -> None:
    for tokenizer in (trained, byte_level):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())
        assert tokenizer.encode_batch([text, text]) == [ids, ids]
    assert len(byte_level.encode(text)) == len(text.encode())


def test_control_tokens_are_never_read_from_text(trained: Tokenizer) -> None:
    names = [*LEADING, *TRAILING]
    found = {index for name in names if (index := trained.control_id(name)) is not None}
    assert len(found) == len(names)
    ids = trained.encode("".join(names))
    assert not found & set(ids)
    assert trained.encode("<think>", control_tokens=True) == [trained.control_id(control.THINK)]
    assert not trained.token_bytes[list(found)].any()
    assert trained.decode([trained.control_id(control.THINK)]) == "<think>"  # pyright: ignore[reportArgumentType]


def test_the_layout_of_ids_is_the_published_one(trained: Tokenizer) -> None:
    assert (trained.bos_id, trained.eos_id, trained.pad_id) == (0, 1, 2)
    last = range(trained.vocab_size - len(TRAILING), trained.vocab_size)
    assert {trained.control_id(name) for name in TRAILING} == set(last)
    assert SMALLEST_VOCABULARY < trained.vocab_size <= 400


def test_pre_tokeniser_cuts_as_the_report_does() -> None:
    tokenizer = Tokenizer(train_bpe(["1234567 f(x);\n\n 漢字kana"] * 50, 600))
    pieces = [tokenizer.decode([index]) for index in tokenizer.encode("1234567 f(x);\n\n")]
    assert pieces == ["123", "456", "7", " f", "(x", ");\n\n"]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("1234567", ["123", "456", "7"]),
        ("x1٣Ⅷ2", ["x", "1٣Ⅷ", "2"]),
        ("漢字kanaかなカナ", ["漢字", "kana", "かなカナ"]),
        ("don't (self.x)", ["don", "'t", " (", "self", ".x", ")"]),
        ("f(x);\n\n  y", ["f", "(x", ");\n\n", " ", " y"]),
        ("\ta\u0301b  \n c ", ["\ta\u0301b", "  \n", " c", " "]),
        (" €5—ok", [" €", "5", "—", "ok"]),
    ],
)
def test_cuts_before_bytes_are_merged(text: str, pieces: list[str]) -> None:
    assert _cuts(json.loads(byte_tokenizer()), text) == pieces


@pytest.mark.skipif(not PUBLISHED.exists(), reason="the published DeepSeek tokenizer is not beside the repository")
def test_cuts_are_those_of_the_published_tokenizer() -> None:
    ours, published = json.loads(byte_tokenizer()), json.loads(gzip.decompress(PUBLISHED.read_bytes()))
    random = np.random.default_rng(0)
    alphabet = [*"abZé漢字かなカー𝄞\u0301 \t\n\r.,;:!?()[]{}<>_-+=*/\\|`~@#$%^&\"'01239٣Ⅷ、。「」€\u00a0\u3000"]
    alphabet += [chr(code) for code in random.integers(1, 0xD800, 50)]
    text = "".join(random.choice(alphabet, 30_000))
    assert _cuts(ours, text) == _cuts({**published, "model": ours["model"], "added_tokens": []}, text)


def test_training_is_deterministic() -> None:
    assert Tokenizer(train_bpe(CODE, 320)).fingerprint == Tokenizer(train_bpe(CODE, 320)).fingerprint


def test_sample_is_bounded_and_takes_from_the_whole_corpus() -> None:
    documents = [(f"n{index}", chr(97 + index % 26) * 1000) for index in range(200)]
    sample = sample_text(iter(documents), budget=20_000)
    assert sum(map(len, sample)) == 20_000
    assert len(set(sample)) > 5
    assert sample == sample_text(reversed(documents), budget=20_000)
    (piece,) = sample_text([("one", "x" * 1000)], budget=10)
    assert len(piece) == 1000


def test_saved_tokenizer_is_the_same(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path / "run")
    (tmp_path / "packed.json.gz").write_bytes(gzip.compress((tmp_path / "run/tokenizer.json").read_bytes()))
    for path in (tmp_path / "run", tmp_path / "run/tokenizer.json", tmp_path / "packed.json.gz"):
        assert Tokenizer.load(path).fingerprint == trained.fingerprint
    copied = pickle.loads(pickle.dumps(trained))  # noqa: S301 worker processes get it pickled
    assert copied.encode("def f(): <think>") == trained.encode("def f(): <think>")
    assert list((tmp_path / "run").iterdir()) == [tmp_path / "run/tokenizer.json"]


def test_ids_beyond_the_vocabulary_decode_to_nothing(byte_level: Tokenizer) -> None:
    assert byte_level.decode([*byte_level.encode("ab"), 10_000, -1]) == "ab"


@pytest.mark.skipif(not PUBLISHED.exists(), reason="the published DeepSeek tokenizer is not beside the repository")
def test_published_tokenizer() -> None:
    tokenizer = Tokenizer.load(PUBLISHED)
    assert tokenizer.vocab_size == 128_815
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)
    names = (control.THINK, control.END_THINK, control.FIM_HOLE, control.FIM_BEGIN, control.FIM_END)
    assert [tokenizer.control_id(name) for name in (*names, control.USER, control.ASSISTANT)] == [
        *range(128_798, 128_805)
    ]
    text = "Hello, wörld! <think> 漢字 1234567\r\n\n\tx = {'a': 𝄞}"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert max(ids) < 128_000
    assert tokenizer.encode("Hello") == [19_923]


def test_sentencepiece_conversions_are_taken() -> None:
    tokenizer = Tokenizer(json.dumps(_byte_fallback()))
    text = "aé b"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())


def test_gaps_in_the_ids_are_taken(byte_level: Tokenizer) -> None:
    definition = json.loads(byte_tokenizer())
    for token in definition["added_tokens"][len(LEADING) :]:
        token["id"] += 40
        definition["model"]["vocab"][token["content"]] = token["id"]
    tokenizer = Tokenizer(json.dumps(definition))
    assert tokenizer.vocab_size == byte_level.vocab_size + 40
    assert tokenizer.control_id(control.FIM_HOLE) == (byte_level.control_id(control.FIM_HOLE) or 0) + 40
    assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,)
    assert tokenizer.token_bytes.sum() == 256
    assert tokenizer.decode([*tokenizer.encode("é"), 270]) == "é"
    assert not PunctuationSplitting(tokenizer).growth(np.arange(tokenizer.vocab_size)).any()


def test_splitting_of_joined_punctuation() -> None:
    tokenizer = Tokenizer(train_bpe(["x = (1);\n\ny = [2];\n_\n"] * 50, 600))
    splitting = PunctuationSplitting(tokenizer)
    splittable = np.flatnonzero(splitting.growth(np.arange(tokenizer.vocab_size)))
    texts = {tokenizer.decode([index]) for index in splittable}
    assert {");\n\n", "];\n"} <= texts
    assert all(text.strip("\r\n") and text.endswith("\n") for text in texts)
    ids = np.array(tokenizer.encode("x = (1);\n\ny = [2];\n"), np.uint16)
    possible = splitting.growth(ids) > 0
    both = splitting.split(ids, possible)
    assert tokenizer.decode(both) == tokenizer.decode(ids)
    assert len(both) == len(ids) + splitting.growth(ids).sum() > len(ids)
    assert ");\n\n" not in [tokenizer.decode([index]) for index in both]
    assert (splitting.split(ids, np.zeros(len(ids), bool)) == ids).all()


def _cuts(definition: dict[str, Any], text: str) -> list[str]:
    cutter = tokenizers.Tokenizer.from_str(json.dumps(definition)).pre_tokenizer
    return [text[start:stop] for _, (start, stop) in cutter.pre_tokenize_str(text)]  # pyright: ignore[reportOptionalMemberAccess]


def _byte_fallback() -> dict[str, Any]:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁b"]
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": index, "content": tokens[index], "special": True, "normalized": False, **_FLAGS}
            for index in range(3)
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [["▁", "b"]],
            "unk_token": "<unk>",
            "byte_fallback": True,
        },
    }


_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False}


def _byte_definition(**changes: Any) -> str:
    return json.dumps({**json.loads(byte_tokenizer()), **changes})


def _with_model(**changes: Any) -> str:
    definition = json.loads(byte_tokenizer())
    return json.dumps({**definition, "model": {**definition["model"], **changes}})


_VOCABULARY = json.loads(byte_tokenizer())["model"]["vocab"]
DOUBLING = {"type": "Replace", "pattern": {"String": "x"}, "content": "xx"}
_CATASTROPHE = {"type": "Split", "pattern": {"Regex": "(" * 5000}, "behavior": "Isolated", "invert": False}
BAD = {
    "not JSON": ("{", "not valid JSON"),
    "deep": ("[" * 100_000, "nested deeper"),
    "no object": ("[]", "expected a JSON object"),
    "no model": ('{"model": 3}', "no object 'model'"),
    "unknown model": ('{"model": {"type": "Other"}}', "not a usable tokenizer.json"),
    "added without id": (_byte_definition(added_tokens=[{"content": "x"}]), "needs an id and a content"),
    "id too large": (_with_model(vocab={**_VOCABULARY, "Ġ!": 4294967295}), "id 4294967295, far outside its vocabulary"),
    "added id too large": (
        _byte_definition(added_tokens=[{"id": 9999, "content": "<x>", "special": True, "normalized": False, **_FLAGS}]),
        "outside its vocabulary|declares id 9999",
    ),
    "bad pattern": (_byte_definition(pre_tokenizer=_CATASTROPHE), "not a usable tokenizer.json"),
    "no decoder": (_byte_definition(decoder=None), "not a byte-level tokenizer"),
    "not bytes": (_with_model(vocab={**_VOCABULARY, "漢": len(_VOCABULARY)}), "does not spell bytes|declares id"),
    "loses text": (_byte_definition(normalizer={"type": "Lowercase"}), "does not decode to the text"),
    "many entries": ('{"model": [' + "[]," * 3_000_000 + "[]]}", "has more than"),
    "doubles": (
        _byte_definition(normalizer={"type": "Sequence", "normalizers": [DOUBLING] * 28}),
        "normalizers may lengthen a text",
    ),
    "panics": (_byte_definition(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}), "not a usable"),
    "no end": (
        json.dumps(json.loads(byte_tokenizer()), ensure_ascii=False).replace("end▁of▁sentence", "something▁else"),
        "no end-of-text token",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_definition_is_one_line(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    content, message = BAD[name]
    file = tmp_path / "tokenizer.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        Tokenizer.load(file)
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)
    assert capfd.readouterr().err == ""  # no page of the library's own


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.json", None, "cannot read .*absent"),
        (
            "cut.json.gz",
            gzip.compress(b"{}" * 1000, mtime=0)[:20],
            "cannot read the tokenizer",
        ),  # the same name in every process
        ("plain.json.gz", b"{}", "cannot read the tokenizer"),
        ("latin.json", b'{"\xe9": 1}', "not UTF-8 at byte 2"),
    ],
)
def test_bad_file_is_one_line(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        Tokenizer.load(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_pattern_that_explodes_on_a_text_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    """The library panics on such a text, and its panic is no subclass of Exception."""
    cut = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    both = {"type": "Sequence", "pretokenizers": [cut, byte_level]}
    tokenizer = Tokenizer(_byte_definition(pre_tokenizer=both), "my.json")
    for fail in (lambda: tokenizer.encode("x" * 200), lambda: tokenizer.encode_batch(["x" * 200])):
        with pytest.raises(UserError, match=r"my\.json fails on") as caught:
            fail()
        assert "\n" not in str(caught.value)


def test_text_without_utf8_form_is_one_line(byte_level: Tokenizer) -> None:
    with pytest.raises(UserError, match="character 1 of the text is a lone surrogate"):
        byte_level.encode("a\ud800")


def test_vocabulary_too_small_to_train() -> None:
    with pytest.raises(ConfigError, match=f"at least {SMALLEST_VOCABULARY}"):
        train_bpe(CODE, SMALLEST_VOCABULARY - 1)
    assert Tokenizer(train_bpe(CODE, SMALLEST_VOCABULARY)).vocab_size == SMALLEST_VOCABULARY


def test_a_pipe_or_a_link_out_of_the_folder_is_no_tokenizer(byte_level: Tokenizer, tmp_path: Path) -> None:
    byte_level.save(tmp_path / "other")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/tokenizer.json").symlink_to(tmp_path / "other/tokenizer.json")
    with pytest.raises(UserError, match="leads out of the folder"):
        Tokenizer.load(tmp_path / "run")
    (tmp_path / "run/tokenizer.json").unlink()
    os.mkfifo(tmp_path / "run/tokenizer.json")
    for path in (tmp_path / "run", tmp_path / "run/tokenizer.json"):
        with pytest.raises(UserError, match=r"a pipe|not a regular file"):
            Tokenizer.load(path)


@pytest.mark.parametrize(("limit", "value"), [("memory", 2**26), ("seconds", 1)])
def test_limits_of_memory_and_time(limit: str, value: int) -> None:
    """A quarter of a million tokens take more than either limit; the process that tries them is ended."""
    vocabulary = {f"{index:x}": index for index in range(300_000)}
    definition = _with_model(vocab={**vocabulary, **{token: index for index, token in enumerate("ab")}})
    text = "x" * 40_000_000 if limit == "seconds" else "x"  # a fast processor reads 4 million in the second
    problem = try_tokenizer(definition, text, **{limit: value})
    assert problem is not None
    assert problem.startswith("it takes more than")


def test_dropout_is_switched_off_and_said(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(json.loads(train_bpe(CODE, 400)) | {}).replace('"dropout": null', '"dropout": 0.5'))
    with pytest.warns(UserWarning, match=r"model\.dropout is switched off") as said:
        tokenizer = Tokenizer.load(file)
    assert len(said) == 1
    assert len({tuple(tokenizer.encode(CODE[0])) for _ in range(5)}) == 1
    tokenizer.save(tmp_path / "run")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Tokenizer.load(tmp_path / "run").fingerprint == tokenizer.fingerprint
