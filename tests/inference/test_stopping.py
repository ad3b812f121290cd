"""Checks stop strings against a search in the whole text."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from dsv3_jax.inference.stopping import StopStrings


@given(
    text=st.text(alphabet="abé漢", max_size=12),
    stops=st.lists(st.text(alphabet="abé漢", min_size=1, max_size=3), max_size=3),
    cuts=st.sets(st.integers(0, 36)),
)
def test_text_ends_before_the_first_stop_string(text: str, stops: list[str], cuts: set[int]) -> None:
    """Tokens are any pieces of the bytes, so that stop strings and characters go over their borders."""
    raw = text.encode()
    ends = sorted({cut for cut in cuts if cut < len(raw)} | {len(raw)})
    pieces = [raw[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    machine = StopStrings(lambda tokens: b"".join(pieces[token] for token in tokens), stops)
    got = ""
    for token in range(len(pieces)):
        got += machine.add(token)
        whole = b"".join(pieces[: token + 1]).decode(errors="ignore")
        found = [whole.find(stop) for stop in stops if stop in whole]
        if machine.found:
            # The stop string that is complete first ends the text.
            assert found
            assert got == whole[: min(found)]
            return
        assert not found
        assert whole.startswith(got)
    assert got + machine.end() == text
