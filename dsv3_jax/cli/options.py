"""Command lines made from dataclasses, with errors in one line. tyro prints the help."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from dsv3_jax.cli.fields import kinds_of_fields, read_value, with_fields
from dsv3_jax.errors import ConfigError, UserError
from dsv3_jax.regular_files import read_regular
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


class OptionParser(argparse.ArgumentParser):
    """An argparse parser of one command that raises UserError for wrong arguments.

    Its description and examples are printed as they are written, and a misspelt option is not taken for another one.

    Args:
      prog: the command as it is typed, for example "dsv3 eval".
      description: what the command does.
      examples: printed after the options.
      unknown: what is said of an option that does not exist; by default where the options are listed.
    """

    def __init__(self, prog: str, description: str, examples: str = "", *, unknown: str = "") -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self._unknown = unknown

    def error(self, message: str) -> NoReturn:
        """Raises a UserError with argparse's message."""
        hint = self._unknown if message.startswith("unrecognized arguments") else ""
        raise UserError(f"{self.prog}: {message:.200}; {hint or f'see {self.prog} --help'}")


def add_weight_formats(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say in which format a command that writes text keeps weights."""
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="dtype of the weights (default: as the checkpoint has them)"
    )
    parser.add_argument(
        "--int8",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="keep the weights of products in eight bits, a quarter of float32's memory: the fastest on a CPU, and a "
        "little less exact (default: no)",
    )


def parse[Options](argv: list[str], *, prog: str, description: str, default: Options) -> Options:
    """Parses `argv` into a dataclass. The fields of nested dataclasses are `--section.field VALUE`.

    Args:
      prog: the command's name, for messages.
      description: text at the top of --help.
      default: the dataclass, with the values of the options that `argv` does not give.

    Raises:
      UserError: an option does not exist, or its value is not of its type.
      SystemExit: after --help.
    """
    if any(word in ("-h", "--help") for word in argv):
        import tyro

        arguments: dict[str, Any] = {"prog": prog, "description": description, "default": default}
        return tyro.cli(tyro.conf.AvoidSubcommands[type(default)], args=["--help"], **arguments)
    try:
        return with_fields(default, _given(argv, kinds_of_fields(default)))
    except ConfigError:
        raise
    except UserError as error:
        raise UserError(f"{error}; see {prog} --help") from None


def _given(argv: list[str], kinds: dict[str, Any]) -> dict[str, Any]:
    """Returns the values that a command line gives to fields, by dotted name."""
    given: dict[str, Any] = {}
    words = iter(argv)
    for word in words:
        if not word.startswith("--"):
            raise UserError(f"the word {word!r:.80} belongs to no option")
        option, has_value, text = word.partition("=")
        name = option.removeprefix("--").replace("-", "_")
        kind, positive = kinds.get(name), re.sub(r"(^|\.)no_", r"\1", name)
        if kind is None and kinds.get(positive) is bool and not has_value:
            given[positive] = False
        elif kind is None:
            known = [f"--{known.replace('_', '-')}" for known in kinds]
            near = _nearest(option.replace("_", "-"), known)
            raise UserError(
                f"option {option} does not exist; {f'did you mean {near}?' if near else 'all options are in the help'}"
            )
        elif kind is bool and not has_value:
            given[name] = True
        else:
            value = text if has_value else next(words, None)
            if value is None or (not has_value and value.startswith("--")):
                raise UserError(f"option {option} needs a value")
            given[name] = read_value(kind, value, option)
    return given


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


def text_of_file(path: Path) -> str:
    """Returns a text without the line break at its end.

    Raises:
      UserError: the file cannot be read, is larger than a megabyte, is empty, or is not UTF-8.
    """
    try:
        text = read_regular(path, max_bytes=2**20).decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 at byte {error.start}") from None
    if not text.strip():
        raise UserError(f"{path} is empty")
    return text


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


def _nearest(name: str, known: list[str]) -> str | None:
    """Returns the option that was probably meant: the whole name counts, or its last part, or a usual short form."""
    last = name.lstrip("-").rpartition(".")[2]
    last = _SHORT_FORMS.get(last, last)
    endings = {option.lstrip("-").rpartition(".")[2]: option for option in reversed(known)}
    whole = difflib.get_close_matches(name, known, n=2, cutoff=0.6)
    near = difflib.get_close_matches(last, endings, n=1, cutoff=0.6)
    if last in endings:
        return endings[last]
    if near and (not whole or _likeness(last, near[0]) > _likeness(name, whole[0])):
        return endings[near[0]]
    return " or ".join(whole) or None


def _likeness(one: str, other: str) -> float:
    """Returns how alike two words are, from 0 to 1."""
    return difflib.SequenceMatcher(None, one, other).ratio()
