"""Finds the answer in a completion: the content of its last \\boxed{...} or <answer>...</answer>, and its numbers."""

from __future__ import annotations

import re
from fractions import Fraction

_THINK = re.compile(r"\A\s*<think>(?P<thought>.*?)</think>\s*<answer>(?P<answer>.*?)</answer>\s*\Z", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:\s*/\s*\d+)?")
_LONGEST = 1000  # characters of an answer that are read as a number


def final_answer(completion: str) -> str | None:
    """Returns the content of the last \\boxed{...}, else of the last <answer>...</answer>; None without either."""
    boxed = _last_boxed(completion)
    if boxed is not None:
        return boxed.strip()
    tagged = _ANSWER.findall(completion)
    return tagged[-1].strip() if tagged else None


def thought_and_answer(completion: str) -> tuple[str, str] | None:
    """Returns the two parts of "<think>...</think> <answer>...</answer>", with nothing around them; None otherwise.

    This is the form that DeepSeek-R1-Zero's template asks for (R1 report, table 1).
    """
    found = _THINK.match(completion)
    if found is None:
        return None
    parts = found["thought"], found["answer"]
    tags = ("<think>", "</think>", "<answer>", "</answer>")
    return None if any(tag in part for part in parts for tag in tags) else parts


def as_number(text: str) -> Fraction | None:
    """Returns the number that `text` is: an integer, a decimal or a fraction, exactly. None for anything else.

    Thousands separators and a unit of money or percent around the number are allowed.
    """
    cleaned = text.strip().strip("$").removesuffix("%").replace(",", "").replace("\u2212", "-").strip()
    if len(cleaned) > _LONGEST or not _NUMBER.fullmatch(cleaned):
        return None
    above, _, below = cleaned.partition("/")
    if below and int(below) == 0:
        return None
    return Fraction(above.strip()) / (Fraction(below.strip()) if below else 1)


def _last_boxed(text: str) -> str | None:
    """Returns the content of the last \\boxed{...} whose braces are balanced."""
    start = text.rfind("\\boxed{")
    while start >= 0:
        depth = 0
        for position in range(start + len("\\boxed"), len(text)):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                return text[start + len("\\boxed{") : position]
        start = text.rfind("\\boxed{", 0, start)
    return None
