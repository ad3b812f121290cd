"""Checks that fill-in-middle has the report's layout and loses nothing of the document."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.data import Tokenizer
from dsv3_jax.data import control_tokens as control
from dsv3_jax.data.fill_in_middle import FillInMiddle
from dsv3_jax.data.tokenizer_training import byte_tokenizer, train_bpe
from dsv3_jax.errors import UserError

TRAINED = Tokenizer(train_bpe(["def run(self):\n    return 漢字漢字;\n\n"] * 40, 330))
BYTES = Tokenizer(byte_tokenizer())
SHARE = st.floats(0, 1, exclude_max=True)
TEXT = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("return漢字 ;\n"), max_size=40)


def parts(tokenizer: Tokenizer, ids: np.ndarray) -> tuple[bytes, bytes, bytes]:
    """Returns prefix, suffix and middle of a rearranged document."""
    listed = ids.tolist()
    hole, end = (listed.index(tokenizer.control_id(name)) for name in (control.FIM_HOLE, control.FIM_END))
    assert listed[0] == tokenizer.control_id(control.FIM_BEGIN)
    assert hole < end
    assert sum(index in (listed[0], listed[hole], listed[end]) for index in listed) == 3
    return tuple(map(tokenizer.to_bytes, (ids[1:hole], ids[hole + 1 : end], ids[end + 1 :])))  # pyright: ignore[reportReturnType]


@settings(max_examples=200, deadline=None)
@given(text=TEXT, shares=st.tuples(SHARE, SHARE).map(sorted))
def test_three_parts_are_the_document(text: str, shares: list[float]) -> None:
    for tokenizer in (TRAINED, BYTES):
        middle_last = FillInMiddle(tokenizer)
        rearranged = middle_last.rearrange(np.array(tokenizer.encode(text), np.int32), *shares)
        prefix, suffix, middle = parts(tokenizer, rearranged)
        assert (prefix + middle + suffix).decode() == text
        for part in (prefix, middle, suffix):
            part.decode("utf-8")  # never cut inside a character
        # The cuts are where they were asked for, or at the nearest boundary between characters before that.
        raw = text.encode()
        for share, border in ((shares[0], len(prefix)), (shares[1], len(prefix + middle))):
            place = int(share * (len(raw) + 1))
            while 0 < place < len(raw) and raw[place] & 0xC0 == 0x80:
                place -= 1
            assert border == place


def test_cuts_fall_inside_tokens_too() -> None:
    ids = np.array(TRAINED.encode("return"), np.int32)
    assert len(ids) < 6
    prefixes = {parts(TRAINED, FillInMiddle(TRAINED).rearrange(ids, share / 7, 0.99))[0] for share in range(7)}
    assert prefixes == {b"return"[:size] for size in range(7)}


def test_both_cuts_inside_one_token() -> None:
    ids = np.array(TRAINED.encode("return"), np.int32)
    assert parts(TRAINED, FillInMiddle(TRAINED).rearrange(ids, 2 / 7, 4 / 7)) == (b"re", b"rn", b"tu")


def test_tokenizer_without_the_tokens_is_refused() -> None:
    definition = json.loads(byte_tokenizer())
    definition["added_tokens"] = [token for token in definition["added_tokens"] if "fim" not in token["content"]]
    for place, token in enumerate(definition["added_tokens"]):
        token["id"] = place if place < 3 else 256 + place
    with pytest.raises(UserError, match="no fill-in-middle tokens; set data"):
        FillInMiddle(Tokenizer(json.dumps(definition)))


def test_a_token_of_several_characters_is_cut_between_them() -> None:
    text = "漢字漢字"
    ids = np.array(TRAINED.encode(text), np.int32)
    assert len(ids) == 1
    size = len(text.encode())
    prefixes = [
        parts(TRAINED, FillInMiddle(TRAINED).rearrange(ids, place / (size + 1), 0.99))[0] for place in range(size)
    ]
    assert [prefix.decode() for prefix in prefixes] == [text[: place // 3] for place in range(size)]
