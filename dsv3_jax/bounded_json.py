"""Parses JSON from untrusted files: size and depth are bounded, duplicate keys and NaN are refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dsv3_jax.errors import UserError
from dsv3_jax.regular_files import read_regular

_MAX_SEPARATORS = 3_000_000  # commas and opening brackets; each can become a Python object of about 100 bytes
_MAX_DEPTH = 100
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"')
_NOT_BRACKET = re.compile(rb"[^\[\]{}]+")


def parse_object(data: bytes, what: str) -> dict[str, Any]:
    """Returns the JSON object in `data`.

    Args:
      what: the file and the part of it, for the message.

    Raises:
      UserError: the data is not UTF-8, not JSON or not an object, has a key twice, is nested too deep or has too many
        entries.
    """
    if data.count(b",") + data.count(b"[") + data.count(b"{") > _MAX_SEPARATORS:
        raise UserError(f"{what}: JSON has more than {_MAX_SEPARATORS:,} entries; too many for a file of a model")
    if data.count(b"[") + data.count(b"{") > _MAX_DEPTH:
        _check_depth(data, what)
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what}: not valid JSON ({_first_line(error)})") from None
    if not isinstance(value, dict):
        raise UserError(f"{what}: expected a JSON object, not a {type(value).__name__}")
    return value


def read_object(path: Path, *, max_bytes: int) -> dict[str, Any]:
    """Returns the JSON object in the file `path`; a file of more than `max_bytes` is refused (see `parse_object`)."""
    return parse_object(read_regular(path, max_bytes=max_bytes), str(path))


def _check_depth(data: bytes, what: str) -> None:
    depth = 0
    for brackets in _NOT_BRACKET.split(_STRING.sub(b"", data)):
        for bracket in brackets:
            depth += 1 if bracket in b"[{" else -1
            if depth > _MAX_DEPTH:
                raise UserError(f"{what}: JSON is nested deeper than {_MAX_DEPTH}")


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {shown(key)} appears twice")
        result[key] = value
    return result


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:200]


def shown(text: object) -> str:
    """Returns a name from a file for use in a one-line message: quoted, control characters escaped, shortened."""
    quoted = repr(text)
    return quoted if len(quoted) <= 120 else quoted[:100] + "..." + quoted[-15:]
