"""Prints texts that come from elsewhere: file names, configurations, generated tokens, messages of other libraries."""

from __future__ import annotations

import sys
from typing import TextIO

# A terminal obeys control characters: it would clear the screen, hide text, or answer as if the user had typed.
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """Returns the text with control characters other than line breaks and tabs spelled out, such as `\\x1b`."""
    return text.translate(_CONTROL)


def say(text: str, *, to: TextIO | None = None) -> None:
    """Prints a printable line, on standard output if `to` is not given."""
    print(printable(text), file=to or sys.stdout, flush=True)


def replace_what_cannot_be_shown() -> None:
    """Makes the standard streams print `?` for characters that their encoding lacks, instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")
