"""The text of a request as its tokens come, ended by a stop string wherever tokens begin and end."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence


class StopStrings:
    """Turns tokens to text and looks for stop strings.

    Text is held back while it may still be the beginning of a stop string, and bytes while they are not a character.

    Args:
      to_bytes: returns the bytes of tokens.
      stops: strings before which the text ends.
    """

    def __init__(self, to_bytes: Callable[[Sequence[int]], bytes], stops: Sequence[str]):
        self._to_bytes = to_bytes
        self._stops = stops
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.found = False

    def add(self, token: int) -> str:
        """Returns the text that this token completes; sets `found` if a stop string ended it."""
        return self._feed(self._decoder.decode(self._to_bytes([token])))

    def end(self) -> str:
        """Returns the text that was held back, at the end of a request that no stop string ended."""
        if self.found:
            return ""
        text = self._feed(self._decoder.decode(b"", final=True))
        held, self._held = self._held, ""
        return text + held if not self.found else text

    def _feed(self, piece: str) -> str:
        text = self._held + piece
        starts = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if starts:
            self.found, self._held = True, ""
            return text[: min(starts)]
        longest = max((len(stop) for stop in self._stops), default=0)
        keep = next(
            (
                size
                for size in range(min(longest - 1, len(text)), 0, -1)
                if any(stop.startswith(text[-size:]) for stop in self._stops)
            ),
            0,
        )
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]
