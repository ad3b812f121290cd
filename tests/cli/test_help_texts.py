"""Reads the help of every command: each option has a text of its own that says what it is."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from dsv3_jax.cli.main import COMMANDS, main


def texts_of_options(shown: str) -> dict[str, str]:
    """Returns the text of each option in a help page, without the values that it takes and its default."""
    plain = re.sub(r"^[╭╰].*$", "", shown, flags=re.M).replace("│", " ")
    options = plain.partition("\noptions:")[2].partition("\nexample")[0] or plain
    pieces = re.split(r"^  ?(?=--?[a-z])", options, flags=re.M)[1:]
    found = {}
    for piece in pieces:
        head, _, rest = piece.partition("\n")
        names = re.match(r"(?:-\w, )?(--[\w.-]+(?:, --[\w.-]+)*)", head)
        if names is None:
            continue
        values = re.sub(r"^ ?(\{[^}]*\}\|?)?[A-Z_]*", "", head[names.end() :])
        text = re.sub(r"\(default.*", "", " ".join(f"{values} {rest}".split()))
        found[names[1].split(",")[0]] = text.strip()
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_text_of_its_own(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    texts = texts_of_options(capsys.readouterr().out)
    assert "--help" in texts
    short = {option: text for option, text in texts.items() if len(text.split()) < 3}
    assert not short, f"these say too little: {short}"
    shared = [text for text, count in Counter(texts.values()).items() if count > 1]
    assert not shared, f"several options have the text {shared[0]!r}"
