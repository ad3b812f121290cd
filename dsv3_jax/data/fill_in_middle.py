"""Fill-in-middle (report section 4.1): rearranges a document as prefix, suffix, middle, before packing.

    <fim_begin> prefix <fim_hole> suffix <fim_end> middle <eos>

A cut may be between any two characters, also inside a token. Each half of that token is then encoded again, as it is
when a user asks for a completion in the middle of a word.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int32

from dsv3_jax.data.control_tokens import FIM_BEGIN, FIM_END, FIM_HOLE
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.errors import UserError

Ids = Int32[np.ndarray, " n"]


class FillInMiddle:
    """Rearranges documents of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Takes the control tokens from the tokenizer.

        Raises:
          UserError: the tokenizer has no fill-in-middle tokens.
        """
        begin, hole, end = (tokenizer.control_id(name) for name in (FIM_BEGIN, FIM_HOLE, FIM_END))
        if begin is None or hole is None or end is None:
            raise UserError("the tokenizer has no fill-in-middle tokens; set data.fill_in_middle_rate to 0")
        self._begin, self._hole, self._end = begin, hole, end
        self._tokenizer = tokenizer

    def rearrange(self, ids: Ids, first: float, second: float) -> Ids:
        """Returns the document with its middle moved to its end, without an end-of-text token.

        Args:
          ids: tokens of the document.
          first: where the middle begins, as a fraction of the document's bytes.
          second: where the middle ends, as a fraction; 0 <= first <= second < 1.
        """
        ends = np.cumsum(self._tokenizer.token_bytes[ids])
        size = int(ends[-1]) if len(ends) else 0
        prefix, rest = self._cut(ids, ends, int(first * (size + 1)))
        # Counted from the end: the first cut may have changed the number of tokens, but not of bytes.
        rest_ends = np.cumsum(self._tokenizer.token_bytes[rest])
        rest_size = int(rest_ends[-1]) if len(rest_ends) else 0
        middle, suffix = self._cut(rest, rest_ends, rest_size - (size - int(second * (size + 1))))
        parts = ([self._begin], prefix, [self._hole], suffix, [self._end], middle)
        return np.concatenate([np.asarray(part, np.int32) for part in parts])

    def _cut(self, ids: Ids, ends: np.ndarray, position: int) -> tuple[Ids, Ids]:
        """Cuts `ids` before byte `position`, or at the nearest boundary between characters before it.

        Args:
          ends: number of bytes up to the end of each token.
        """
        index = int(np.searchsorted(ends, position, side="right"))
        if index == len(ids):
            return ids, ids[:0]
        start = int(ends[index - 1]) if index else 0
        whole = self._tokenizer.to_bytes(ids[index : index + 1])
        halves = self._halves(whole, position - start)
        if halves is not None:
            left, right = halves
            return np.append(ids[:index], left).astype(np.int32), np.append(right, ids[index + 1 :]).astype(np.int32)
        while index and _inside_character(self._tokenizer.to_bytes(ids[index : index + 1])):
            index -= 1
        return ids[:index], ids[index:]

    def _halves(self, whole: bytes, position: int) -> tuple[list[int], list[int]] | None:
        """Returns the ids of both halves of a token's bytes; None where the cut should be before the token."""
        while position > 0 and whole[position] & 0xC0 == 0x80:
            position -= 1
        if position <= 0:
            return None
        halves = whole[:position], whole[position:]
        try:
            left, right = (self._tokenizer.encode(half.decode("utf-8")) for half in halves)
        except UnicodeDecodeError:  # the token holds only a part of a character
            return None
        exact = (self._tokenizer.to_bytes(left), self._tokenizer.to_bytes(right)) == halves
        return (left, right) if exact else None


def _inside_character(token: bytes) -> bool:
    """Returns whether a token's first byte continues a character of an earlier token."""
    return bool(token) and token[0] & 0xC0 == 0x80
