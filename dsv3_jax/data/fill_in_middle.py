"""Fill-in-middle (section 4.1): a document rearranged as prefix, suffix, middle, before packing.

<fim_begin> prefix <fim_hole> suffix <fim_end> middle <eos>
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Int32

from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.errors import UserError

ADDED_TOKENS = 3


@dataclasses.dataclass(frozen=True)
class FillInMiddle:
    """The three control tokens, and what is done with them."""

    begin_id: int
    hole_id: int
    end_id: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> FillInMiddle:
        """Raises UserError when the tokenizer has no such tokens."""
        ids = (tokenizer.fim_begin_id, tokenizer.fim_hole_id, tokenizer.fim_end_id)
        if None in ids:
            raise UserError("the tokenizer has no fill-in-middle tokens: set data.fill_in_middle_rate to 0")
        return cls(*ids)  # pyright: ignore[reportArgumentType]

    def rearrange(self, ids: Int32[np.ndarray, " n"], first: int, second: int) -> Int32[np.ndarray, " n_plus_3"]:
        """The document with ids[first:second] moved to its end; 0 <= first <= second <= n."""
        prefix, middle, suffix = ids[:first], ids[first:second], ids[second:]
        parts = ([self.begin_id], prefix, [self.hole_id], suffix, [self.end_id], middle)
        return np.concatenate([np.asarray(part, np.int32) for part in parts])

    def restore(self, ids: Int32[np.ndarray, " n_plus_3"]) -> Int32[np.ndarray, " n"]:
        """The inverse of `rearrange`."""
        (hole,), (end,) = np.flatnonzero(ids == self.hole_id), np.flatnonzero(ids == self.end_id)
        return np.concatenate([ids[1:hole], ids[end + 1 :], ids[hole + 1 : end]])
