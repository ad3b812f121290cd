"""Command-line parsing for the experiments. A mistake gives one line of explanation and exit code 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from dsv3_jax.operating_system import restart_with_huge_pages


class CommandLine(argparse.ArgumentParser):
    """An argparse parser that prints errors without the usage block and the description without re-wrapping it."""

    def __init__(self, description: str | None) -> None:
        # allow_abbrev=False: a misspelt option must not be taken for another one.
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """Parses the arguments, those of the program if none are given; a program begins again with huge pages."""
        if args is None:
            restart_with_huge_pages()
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Prints in one line what is wrong and exits with code 2."""
        print(f"{self.prog}: {' '.join(message.split())}; --help lists the options", file=sys.stderr)
        raise SystemExit(2)


def whole_number(least: int):
    """Returns an argparse type that accepts whole numbers of at least `least`."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return value

    return read


def folder(text: str) -> Path:
    """Converts an option to the path of a folder, which need not exist yet; refuses a path through a file."""
    path = Path(text)
    for part in (path, *path.parents):
        if part.exists() and not part.is_dir():
            raise argparse.ArgumentTypeError(f"{part} is a file; give a folder")
    return path
