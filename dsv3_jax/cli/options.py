"""Command lines made from dataclasses by tyro, with errors in one line."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import io
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import tyro

from dsv3_jax.errors import ConfigError, UserError
from dsv3_jax.terminal import say

_SHORT_FORMS = {
    "lr": "learning-rate",
    "bs": "batch-size",
    "epochs": "steps",
    "max-steps": "steps",
    "dataset": "corpus",
    "data": "corpus",
    "seq-len": "sequence-length",
    "output": "out",
    "model-name": "preset",
}


def parse[Options](
    kind: type[Options], argv: list[str], *, prog: str, description: str, default: Options | None = None
) -> Options:
    """Parses `argv` into the dataclass `kind`. The fields of nested dataclasses are `--section.field VALUE`.

    Args:
      prog: the command's name, for messages.
      description: text at the top of --help.
      default: values of the options that `argv` does not give.

    Raises:
      UserError: an option does not exist, or its value is not of its type.
      SystemExit: after --help.
    """
    printed = io.StringIO()
    arguments: dict[str, Any] = {"prog": prog, "description": description}
    if default is not None:
        arguments["default"] = default
    if any(word in ("-h", "--help") for word in argv):
        return tyro.cli(tyro.conf.AvoidSubcommands[kind], args=["--help"], **arguments)
    if default is not None:
        _check_names(argv, default)
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            return tyro.cli(tyro.conf.AvoidSubcommands[kind], args=argv, **arguments)
    except ConfigError:
        raise
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(f"{_one_line(printed.getvalue())}; see {prog} --help") from None


@contextlib.contextmanager
def notes() -> Iterator[None]:
    """Prints each warning of the block as one line on stderr."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_, **__: say(
            f"dsv3: note: {' '.join(str(message).split())}", to=sys.stderr
        )
        yield


def check_repeats(argv: list[str]) -> None:
    """Checks that no option is given twice, since one of its values would be ignored; --prompt may be repeated.

    Raises:
      UserError: an option is repeated, or given together with its opposite.
    """
    given = [re.sub(r"(^--|\.)no-", r"\1", word.split("=")[0].replace("_", "-")) for word in argv if word[:2] == "--"]
    for name, count in Counter(given).items():
        if count > 1 and name != "--prompt":
            raise UserError(f"option {name} is given {count} times; give it once")


def number(kind: type[int] | type[float], least: float, most: float) -> Callable[[str], int | float]:
    """Returns an argparse type that accepts numbers of a kind from `least` to `most`."""

    def read(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not least <= value <= most:
            named = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {named} from {least} to {most}, not {text!r:.80}")
        return value

    return read


def suggest(name: str, choices: list[str]) -> str:
    """Returns a hint that names the choices nearest to a wrong name."""
    near = difflib.get_close_matches(name, choices, n=2)
    return f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(choices)}"


def _check_names(argv: list[str], default: object) -> None:
    known = [f"--{name}" for name in _names(default)]
    for word in argv:
        name = word.split("=")[0].replace("_", "-")
        if word.startswith("--") and name not in known and name.replace("--no-", "--") not in known:
            near = _nearest(name, known)
            hint = f"did you mean {near}?" if near else "see --help for all options"
            raise UserError(f"option {word} does not exist; {hint}")


def _nearest(name: str, known: list[str]) -> str | None:
    """Returns the option that was probably meant: the whole name counts, or its last part, or a usual short form."""
    last = name.lstrip("-").rpartition(".")[2]
    last = _SHORT_FORMS.get(last, last)
    endings = {option.lstrip("-").rpartition(".")[2]: option for option in reversed(known)}
    whole = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    near = difflib.get_close_matches(last, endings, n=1, cutoff=0.6)
    return endings[last] if last in endings else whole[0] if whole else endings[near[0]] if near else None


def _names(value: object, prefix: str = "") -> list[str]:
    names = []
    for field in dataclasses.fields(value):  # pyright: ignore[reportArgumentType]
        name = f"{prefix}{field.name.replace('_', '-')}"
        inner = getattr(value, field.name)
        nested = dataclasses.is_dataclass(inner)
        names += _names(inner, f"{name}.") if nested else [name, f"{prefix}no-{field.name.replace('_', '-')}"]
    return names


def _one_line(text: str) -> str:
    """Returns tyro's boxed message as one line, without the box, its title and the option's help text."""
    words = re.sub(r"[│╭╮╰╯─┌┐└┘|]+|-{5,}", " ", text).split()
    sentence = re.sub(r"^(Parsing error|Value error|Invalid choice|Missing argument)\s*", "", " ".join(words))
    sentence = re.sub(r"^Error parsing (?=--)", "", sentence)  # where a field is wrong
    sentence = re.sub(r"^Error parsing \S+: ", "", sentence)
    ending = r"(?: Argument helptext| For full helptext| Full helptext|see .* --help)"
    return re.split(ending, sentence)[0].strip().rstrip(".") or "bad arguments"
