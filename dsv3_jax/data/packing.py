"""Packing: documents are joined end to end and cut into rows of T + 1 tokens.

Rows start T tokens apart: the last target of a row is the first input of the next. So every token but the first is a
target exactly once. The last row is filled up with padding, which has segment id 0.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Int32, Int64

Row = tuple[Int32[np.ndarray, " T_plus_1"], Int32[np.ndarray, " T_plus_1"]]


def row_count(stream_length: int, sequence_length: int) -> int:
    """Returns the number of rows that hold all targets of `stream_length` tokens."""
    return max(0, -(-(stream_length - 1) // sequence_length))


def pack_row(
    index: int,
    borders: Int64[np.ndarray, " D_plus_1"],
    read: Callable[[int, int, int], np.ndarray],
    sequence_length: int,
    pad_id: int,
) -> Row:
    """Returns one row of the joined documents.

    Args:
      index: number of the row, below `row_count`.
      borders: position of each document's first token among all tokens, and their number; strictly increasing.
      read: (document, start, stop) -> those tokens of the document.
      sequence_length: T.
      pad_id: token that fills up the last row.

    Returns:
      Tokens and segment ids, int32 [T + 1] each. Segment ids are 1 for the first document in the row, then 2, and so
      on; 0 for padding.
    """
    start = index * sequence_length
    stop = min(start + sequence_length + 1, int(borders[-1]))
    tokens = np.full(sequence_length + 1, pad_id, np.int32)
    segments = np.zeros(sequence_length + 1, np.int32)
    document, segment, position = int(np.searchsorted(borders, start, side="right")) - 1, 1, start
    while position < stop:
        end = min(stop, int(borders[document + 1]))
        origin = int(borders[document])
        tokens[position - start : end - start] = read(document, position - origin, end - origin)
        segments[position - start : end - start] = segment
        document, segment, position = document + 1, segment + 1, end
    return tokens, segments
