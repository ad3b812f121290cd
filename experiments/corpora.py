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


KEYS = "abcdefghijklmnop"
NEEDLE = "Z"  # a key like the others in training, that appears nowhere else in a haystack


def write_retrieval(path: Path, documents: int, items: int) -> Path:
    """Writes texts of `items` assignments ("f=3;") and questions ("f?3;", the key's last value), four bytes each."""
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    path.write_text(
        "".join(json.dumps({"text": _retrieval(draw, items, KEYS + NEEDLE)}) + "\n" for _ in range(documents))
    )
    return path


def haystack(draw: random.Random, items: int, depth: float) -> str:
    """`items` items, the needle's assignment at `depth` (0: first) and its question last; the answer ends the text."""
    at = round(depth * (items - 2))
    digit = draw.randint(0, 9)
    text = _retrieval(draw, items - 2, KEYS)
    return f"{text[: 4 * at]}{NEEDLE}={digit};{text[4 * at :]}{NEEDLE}?{digit}"


def _retrieval(draw: random.Random, items: int, keys: str) -> str:
    values: dict[str, int] = {}
    parts = []
    for _ in range(items):
        if values and draw.random() < 0.5:
            key = draw.choice(list(values))
            parts.append(f"{key}?{values[key]};")
        else:
            key = draw.choice(keys)
            values[key] = draw.randint(0, 9)
            parts.append(f"{key}={values[key]};")
    return "".join(parts)


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
