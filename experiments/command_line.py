"""Command lines of the experiments: a mistake is one line (what, where, how to mend) and exit code 2."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn


class CommandLine(argparse.ArgumentParser):
    """argparse without the usage block before its errors; the description is shown as it is written."""

    def __init__(self, description: str | None) -> None:
        # Without abbreviations a misspelt option cannot pass for another one.
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        """Says in one line what is wrong and where to read what is right; exit code 2."""
        print(f"{self.prog}: {' '.join(message.split())}; --help lists the options", file=sys.stderr)
        raise SystemExit(2)


def whole_number(least: int):
    """The type of an option that is a whole number of at least `least`."""

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
    """The type of an option that is a folder, there already or to be made."""
    path = Path(text)
    for part in (path, *path.parents):
        if part.exists() and not part.is_dir():
            raise argparse.ArgumentTypeError(f"{part} is a file; give a folder")
    return path
