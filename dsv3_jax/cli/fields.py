"""New values for the fields of nested dataclasses, as words of a command line or as tables of a TOML file."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, Literal

from dsv3_jax.errors import UserError
from dsv3_jax.regular_files import read_regular

_NONE = "none"  # how a field without a value is written, in either form
_LARGEST_FILE = 1_000_000  # bytes of a TOML file
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def kinds_of_fields(value: Any, prefix: str = "") -> dict[str, Any]:
    """Returns the type of every field of a dataclass and of the dataclasses in it, by dotted name."""
    kinds: dict[str, Any] = {}
    hints = typing.get_type_hints(type(value))
    for field in dataclasses.fields(value):
        inner = getattr(value, field.name)
        if dataclasses.is_dataclass(inner):
            kinds |= kinds_of_fields(inner, f"{prefix}{field.name}.")
        else:
            kinds[prefix + field.name] = hints[field.name]
    return kinds


def read_value(kind: Any, given: Any, name: str) -> Any:
    """Returns a value of a field's type.

    Args:
      kind: int, float, bool, str, a Literal of strings, or one of these or None.
      given: the value, or a text that stands for it; `none` stands for None.
      name: what the message calls the field.

    Raises:
      UserError: `given` is no such value.
    """
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        (kind,) = (part for part in typing.get_args(kind) if part is not types.NoneType)
        if given in (_NONE, "None", None) and given not in typing.get_args(kind):  # "none" may be one of the choices
            return None
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if given in choices:
            return given
        raise UserError(f"{name} must be one of {', '.join(choices)}, not {given!r:.80}")
    if isinstance(given, kind) and not (kind is int and isinstance(given, bool)):
        return given
    try:
        if kind is bool and isinstance(given, str):
            return {"true": True, "false": False}[given.lower()]
        if kind is float and isinstance(given, int) and not isinstance(given, bool):
            return float(given)
        if kind in (int, float) and isinstance(given, str):
            return kind(given)
    except (ValueError, KeyError):
        pass
    raise UserError(f"{name} must be {_KINDS.get(kind, 'a table')}, not {given!r:.80}")


def with_fields[T](value: T, given: dict[str, Any], prefix: str = "") -> T:
    """Returns a dataclass with new values for some fields, by dotted name."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(value):  # pyright: ignore[reportArgumentType]
        inner, name = getattr(value, field.name), prefix + field.name
        if dataclasses.is_dataclass(inner):
            changed = with_fields(inner, given, f"{name}.")
            if changed is not inner:
                changes[field.name] = changed
        elif name in given:
            changes[field.name] = given[name]
    return dataclasses.replace(value, **changes) if changes else value  # pyright: ignore[reportArgumentType]


def with_table[T](value: T, table: dict[str, Any], where: str) -> T:
    """Returns a dataclass with new values for the fields that a table of a TOML file names.

    Args:
      where: the file and the table, for messages, such as `run.toml: training.`.

    Raises:
      UserError: the table names a field that does not exist, or its value is not of the field's type.
    """
    hints, changes = typing.get_type_hints(type(value)), {}
    for key, given in table.items():
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(hints)}"
            raise UserError(f"{where}{key} does not exist; {hint}")
        inner = getattr(value, key)
        if isinstance(given, dict) and dataclasses.is_dataclass(inner):
            changes[key] = with_table(inner, given, f"{where}{key}.")
        elif isinstance(given, dict) and (kind := _dataclass_in(hints[key])) is not None:
            changes[key] = _made(kind, given, f"{where}{key}")
        else:
            changes[key] = read_value(hints[key], given, where + key)
    return dataclasses.replace(value, **changes)  # pyright: ignore[reportArgumentType]


def read_toml(path: Path) -> dict[str, Any]:
    """Returns the content of a TOML file.

    Raises:
      UserError: the file cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(read_regular(path, max_bytes=_LARGEST_FILE).decode("utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not TOML: {' '.join(str(error).split())[:200]}") from error


def _dataclass_in(hint: Any) -> Any:
    parts = typing.get_args(hint) or (hint,)
    return next((part for part in parts if dataclasses.is_dataclass(part)), None)


def _made(kind: Any, table: dict[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(kind)
    if wrong := [name for name in table if name not in hints]:
        raise UserError(f"{where}.{wrong[0]} does not exist; choose one of {', '.join(hints)}")
    values = {name: read_value(hints[name], given, f"{where}.{name}") for name, given in table.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise UserError(f"{where}: {' '.join(str(error).split())}") from error
