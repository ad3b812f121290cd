"""Fill-in-middle (section 4.1): a document rearranged as prefix, suffix, middle, before packing.

    <fim_begin> prefix <fim_hole> suffix <fim_end> middle <eos>

The two cuts fall between any two characters, also inside a token: its two halves are then tokens of their own, as they
are when a user asks for a completion in the middle of a word.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int32

from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.errors import UserError

Ids = Int32[np.ndarray, " n"]


class FillInMiddle:
    """Rearranges documents of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises UserError when the tokenizer has no fill-in-middle tokens."""
        begin, hole, end = tokenizer.fim_begin_id, tokenizer.fim_hole_id, tokenizer.fim_end_id
        if begin is None or hole is None or end is None:
            raise UserError("the tokenizer has no fill-in-middle tokens: set data.fill_in_middle_rate to 0")
        self._begin, self._hole, self._end = begin, hole, end
        self._tokenizer = tokenizer

    def rearrange(self, ids: Ids, first: float, second: float) -> Ids:
        """A document with its middle moved to its end.

        Args:
          first, second: where the middle begins and ends, as shares of the document's bytes; 0 <= first <= second < 1.
        """
        ends = np.cumsum(self._tokenizer.token_bytes[ids])
        size = int(ends[-1]) if len(ends) else 0
        prefix, rest = self._cut(ids, ends, int(first * (size + 1)))
        # Counted from the end, since the first cut may have changed the tokens, but not the bytes.
        rest_ends = np.cumsum(self._tokenizer.token_bytes[rest])
        rest_size = int(rest_ends[-1]) if len(rest_ends) else 0
        middle, suffix = self._cut(rest, rest_ends, rest_size - (size - int(second * (size + 1))))
        parts = ([self._begin], prefix, [self._hole], suffix, [self._end], middle)
        return np.concatenate([np.asarray(part, np.int32) for part in parts])

    def restore(self, ids: Ids) -> Ids:
        """The inverse of `rearrange`, up to tokens that were cut: the bytes are those of the document."""
        (hole,), (end,) = np.flatnonzero(ids == self._hole), np.flatnonzero(ids == self._end)
        return np.concatenate([ids[1:hole], ids[end + 1 :], ids[hole + 1 : end]])

    def _cut(self, ids: Ids, ends: np.ndarray, place: int) -> tuple[Ids, Ids]:
        """Two parts, cut before byte `place` or at the nearest earlier border between characters.

        Args:
          ends: bytes of text up to the end of each token.
        """
        index = int(np.searchsorted(ends, place, side="right"))
        if index == len(ids):
            return ids, ids[:0]
        start = int(ends[index - 1]) if index else 0
        whole = self._tokenizer.to_bytes(ids[index : index + 1])
        halves = self._halves(whole, place - start)
        if halves is not None:
            left, right = halves
            return np.append(ids[:index], left).astype(np.int32), np.append(right, ids[index + 1 :]).astype(np.int32)
        while index and _inside_character(self._tokenizer.to_bytes(ids[index : index + 1])):
            index -= 1
        return ids[:index], ids[index:]

    def _halves(self, whole: bytes, place: int) -> tuple[list[int], list[int]] | None:
        """A token's bytes as two encodings; None where the cut belongs before the token."""
        while place > 0 and whole[place] & 0xC0 == 0x80:
            place -= 1
        if place <= 0:
            return None
        try:
            left, right = whole[:place].decode("utf-8"), whole[place:].decode("utf-8")
        except UnicodeDecodeError:  # the token holds a part of a character
            return None
        ids = self._tokenizer.encode(left), self._tokenizer.encode(right)
        exact = self._tokenizer.to_bytes(ids[0]) == whole[:place] and self._tokenizer.to_bytes(ids[1]) == whole[place:]
        return ids if exact else None


def _inside_character(token: bytes) -> bool:
    """Whether a token's first byte goes on with a character begun before."""
    return bool(token) and token[0] & 0xC0 == 0x80
