"""Writes the texts that the experiments train on, from what every Python installation contains.

`write_domains` writes a corpus of three different domains. The report's figure 9 uses GitHub, Wikipedia and DM
Mathematics; here code is the standard library, prose is its docstrings, and mathematics is generated exercises.
`write_retrieval` and `haystack` write the synthetic texts of the long-context experiment: facts, and questions about
them. All random choices come from fixed seeds.
"""

from __future__ import annotations

import ast
import inspect
import json
import random
import sysconfig
from collections.abc import Sequence
from pathlib import Path

DOMAINS = ("code", "prose", "mathematics")
_DOCUMENT = 2000  # characters per document


def write_domains(path: Path, documents: int = 150) -> Path:
    """Writes `documents` texts per domain as JSON lines (text, domain, name), unless `path` exists; returns `path`."""
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    sources = _sources()
    texts = {
        "code": _cut((text for text in sources), documents),
        "prose": _cut((_docstrings(text) for text in sources), documents),
        "mathematics": [_exercises(number) for number in range(documents)],
    }
    rows = [
        {"text": text, "domain": domain, "name": f"{domain}-{number}"}
        for domain in DOMAINS
        for number, text in enumerate(texts[domain])
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# There are 8 keys and 8 values. The fact "key k has value v" is the character _FACTS[8 k + v], the question "what is
# the value of k?" is _QUESTIONS[k], and the answer v is _ANSWERS[v]. _HAY is filler without meaning.
_FACTS = "".join(map(chr, range(33, 97)))
_ANSWERS, _QUESTIONS, _HAY = "abcdefgh", "ijklmnop", "qrstuvwx"
NEEDLE = 7  # the key of the fact to be found in a haystack


def write_retrieval(path: Path, documents: int, length: int) -> Path:
    """Writes texts of facts, questions with answers, and filler, as JSON lines, unless `path` exists; returns it.

    Each text has `length` tokens (bytes), including the end-of-text token.
    """
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    texts = (_retrieval(draw, length - 1, range(8)) for _ in range(documents))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def haystack(draw: random.Random, length: int, depth: float) -> str:
    """Returns a text of `length` characters with a needle: one fact whose question and answer end the text.

    Args:
      depth: position of the needle, from 0 (at the start) to 1 (just before its question).
    """
    text = _retrieval(draw, length - 3, range(NEEDLE))
    at = round(depth * len(text))
    if at and text[at - 1] in _QUESTIONS:  # do not separate a question from its answer
        at -= 1
    value = draw.randrange(8)
    return f"{text[:at]}{_FACTS[8 * NEEDLE + value]}{text[at:]}{_QUESTIONS[NEEDLE]}{_ANSWERS[value]}"


def _retrieval(draw: random.Random, length: int, keys: Sequence[int]) -> str:
    """Returns a text in which each fact is stated once, in the first half, and asked for at random from then on.

    So the distances from a fact to its questions range up to the length of the text.
    """
    chosen = draw.sample(keys, min(len(keys), max(3, length // 16)))
    told_at = dict(zip(draw.sample(range(length // 2), len(chosen)), chosen, strict=True))
    value: dict[int, int] = {}
    text = ""
    while len(text) < length:
        due = [place for place in told_at if place <= len(text)]
        if due:
            key = told_at.pop(min(due))
            value[key] = draw.randrange(8)
            text += _FACTS[8 * key + value[key]]
        elif value and len(text) < length - 1 and draw.random() < 0.4:
            key = draw.choice(list(value))
            text += _QUESTIONS[key] + _ANSWERS[value[key]]
        else:
            text += draw.choice(_HAY)
    return text


def _sources() -> list[str]:
    """Returns the source of every top-level module of the standard library."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return [file.read_text(encoding="utf-8", errors="ignore") for file in files]


def _docstrings(source: str) -> str:
    """Returns all docstrings of a source file that have at least three lines, joined."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    texts = (ast.get_docstring(node) or "" for node in nodes)
    return "\n\n".join(inspect.cleandoc(text) for text in texts if text.count("\n") >= 2)


def _cut(texts, documents: int) -> list[str]:
    """Cuts texts into equally long pieces, at most four from each text, and returns `documents` of them at random."""
    pieces = [text[: 4 * _DOCUMENT] for text in texts if len(text) >= _DOCUMENT]
    cut = [piece[at : at + _DOCUMENT] for piece in pieces for at in range(0, len(piece) - _DOCUMENT + 1, _DOCUMENT)]
    random.Random(0).shuffle(cut)
    return cut[:documents]


def _exercises(seed: int) -> str:
    """Returns a document of sums, products, comparisons and simple equations, each with its answer."""
    draw = random.Random(seed)
    lines: list[str] = []
    while sum(map(len, lines)) + len(lines) < _DOCUMENT:
        a, b = draw.randint(2, 99), draw.randint(2, 99)
        lines.append(
            draw.choice(
                [
                    f"What is {a} + {b}? {a + b}",
                    f"Work out {a} * {b}. {a * b}",
                    f"Which is bigger: {a} or {b}? {max(a, b)}",
                    f"Solve {a}*x = {a * b} for x. {b}",
                    f"Calculate {a + b} - {b}. {a}",
                ]
            )
        )
    return "\n".join(lines)
