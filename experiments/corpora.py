"""A corpus of three unlike domains that every machine with Python has: code, prose about code, arithmetic.

The report's figure 9 looks at experts over GitHub, Wikipedia and DM Mathematics. Here code is the standard
library, prose is its docstrings, and mathematics is exercises made from a fixed seed.
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
_DOCUMENT = 2000  # characters


def write_domains(path: Path, documents: int = 150) -> Path:
    """Writes a .jsonl of `documents` texts a domain (fields text, domain, name) and returns its path."""
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


def read_domain(path: Path, domain: str) -> list[str]:
    """The texts of one domain."""
    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return [row["text"] for row in rows if row["domain"] == domain]


# One character each: a fact "key k has value v" is _FACTS[8 k + v], the question for k _QUESTIONS[k], v _ANSWERS[v].
_FACTS = "".join(map(chr, range(33, 97)))
_ANSWERS, _QUESTIONS, _HAY = "abcdefgh", "ijklmnop", "qrstuvwx"
NEEDLE = 7  # the key that a haystack tells once


def write_retrieval(path: Path, documents: int, length: int) -> Path:
    """Writes texts of facts, questions with their answers, and hay; with its end each has `length` tokens."""
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    texts = (_retrieval(draw, length - 1, range(8)) for _ in range(documents))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def haystack(draw: random.Random, length: int, depth: float) -> str:
    """`length` characters: such a text with one more fact at `depth` (0: first), whose question and answer end it."""
    text = _retrieval(draw, length - 3, range(NEEDLE))
    at = round(depth * len(text))
    if at and text[at - 1] in _QUESTIONS:  # between a question and its answer
        at -= 1
    value = draw.randrange(8)
    return f"{text[:at]}{_FACTS[8 * NEEDLE + value]}{text[at:]}{_QUESTIONS[NEEDLE]}{_ANSWERS[value]}"


def _retrieval(draw: random.Random, length: int, keys: Sequence[int]) -> str:
    """Every fact is told once, in the first half, and asked for from then on: gaps are as long as the text."""
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
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return [file.read_text(encoding="utf-8", errors="ignore") for file in files]


def _docstrings(source: str) -> str:
    """Docstrings of a file that read as prose: several lines, one after another."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    texts = (ast.get_docstring(node) or "" for node in nodes)
    return "\n\n".join(inspect.cleandoc(text) for text in texts if text.count("\n") >= 2)


def _cut(texts, documents: int) -> list[str]:
    """Pieces of one length from many texts, no text giving more than its share."""
    pieces = [text[: 4 * _DOCUMENT] for text in texts if len(text) >= _DOCUMENT]
    cut = [piece[at : at + _DOCUMENT] for piece in pieces for at in range(0, len(piece) - _DOCUMENT + 1, _DOCUMENT)]
    random.Random(0).shuffle(cut)
    return cut[:documents]


def _exercises(seed: int) -> str:
    """Sums, products, comparisons and small equations with their answers."""
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
