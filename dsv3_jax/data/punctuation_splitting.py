"""Random splitting of tokens that join punctuation and line breaks, against token boundary bias (report section 4.1).

A prompt may end with the punctuation, without the line break, which the model would then never have seen in training.
Splitting some of these tokens in training shows the model both forms.
"""

from __future__ import annotations

import re

import numpy as np
from jaxtyping import Bool, Int32

from dsv3_jax.data.tokenizer import Tokenizer

# One or more marks (no letters, digits, spaces or line breaks), then only line breaks.
_JOINED = re.compile(r"([^\w\s]|_)+[\r\n]+")


class PunctuationSplitting:
    """Splits tokens that join punctuation and line breaks into their two parts, each encoded separately."""

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

    def growth(self, tokens: np.ndarray) -> np.ndarray:
        """Returns the number of tokens that each id gains when it is split; 0 for ids that cannot be split."""
        return self._growth[tokens]

    def split(self, tokens: np.ndarray, chosen: Bool[np.ndarray, " n"]) -> Int32[np.ndarray, " m"]:
        """Returns `tokens` with the chosen ones, which must all be splittable, replaced by their parts."""
        counts = np.where(chosen, self._growth[tokens], 0) + 1
        result = np.repeat(tokens.astype(np.int32), counts)
        starts = np.cumsum(counts) - counts
        for position in np.flatnonzero(chosen):
            parts = self._parts[int(tokens[position])]
            result[starts[position] : starts[position] + len(parts)] = parts
        return result
