"""Random splitting of tokens that join punctuation and line breaks (section 4.1).

Such a token hides the border a prompt may end on: a prompt without its last line break would be a text the model has
never seen. Splitting a share of them in training shows the model both forms.
"""

from __future__ import annotations

import re

import numpy as np
from jaxtyping import Bool, Int32

from dsv3_jax.data.tokenizer import Tokenizer

# Some mark that is neither a letter, a digit, space nor line break, then only line breaks.
_JOINED = re.compile(r"([^\w\s]|_)+[\r\n]+")


class PunctuationSplitting:
    """For each token that joins punctuation and line breaks: the ids of its two parts, each encoded on its own."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        parts: dict[int, Int32[np.ndarray, " pieces"]] = {}
        for index in range(tokenizer.vocab_size):
            text = tokenizer.decode([index]).lstrip(" ")
            if tokenizer.token_bytes[index] > 1 and _JOINED.fullmatch(text):
                whole = tokenizer.decode([index])
                marks = whole.rstrip("\r\n")
                ids = tokenizer.encode(marks) + tokenizer.encode(whole[len(marks) :])
                parts[index] = np.array(ids, np.int32)
        self._parts = parts
        self._growth = np.zeros(tokenizer.vocab_size, np.int64)
        for index, ids in parts.items():
            self._growth[index] = len(ids) - 1

    @property
    def tokens(self) -> list[int]:
        """Ids that can be split."""
        return list(self._parts)

    def growth(self, tokens: np.ndarray) -> np.ndarray:
        """How many tokens each id gains when split; 0 where it cannot be."""
        return self._growth[tokens]

    def split(self, tokens: np.ndarray, chosen: Bool[np.ndarray, " n"]) -> Int32[np.ndarray, " m"]:
        """`tokens` with the chosen ones, all of them splittable, replaced by their parts."""
        counts = np.where(chosen, self._growth[tokens], 0) + 1
        result = np.repeat(tokens.astype(np.int32), counts)
        starts = np.cumsum(counts) - counts
        for place in np.flatnonzero(chosen):
            parts = self._parts[int(tokens[place])]
            result[starts[place] : starts[place] + len(parts)] = parts
        return result
