"""Packing of whole samples into rows: no sample is cut, and each row is filled as far as what comes allows."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32, Int64

from dsv3_jax.data.packing import Row


def best_fit(lengths: Sequence[int], space: int) -> list[list[int]]:
    """Returns which samples each row holds: each sample goes to the row in which it leaves the least space.

    Args:
      lengths: lengths of the samples, each at most `space`, in the order in which they are packed.
      space: tokens of a row.
    """
    rows: list[list[int]] = []
    left: list[tuple[int, int]] = []  # (space left, row), ascending
    for sample, length in enumerate(lengths):
        found = bisect.bisect_left(left, (length, -1))
        if found == len(left):
            rows.append([])
            rest, row = space, len(rows) - 1
        else:
            rest, row = left.pop(found)
        rows[row].append(sample)
        if rest > length:
            bisect.insort(left, (rest - length, row))
    return rows


def join_samples(samples: Sequence[tuple[Int64[np.ndarray, " n"], np.ndarray]], space: int, pad_id: int) -> Row:
    """Returns the row of a few samples: token ids and segment ids, int32 [space].

    Segment ids are 1 for the first sample, then 2, and so on, negative for tokens that are read only, 0 for padding.

    Args:
      samples: the ids of each, and for each id whether it is learned.
    """
    tokens = np.full(space, pad_id, np.int32)
    segments: Int32[np.ndarray, " space"] = np.zeros(space, np.int32)
    at = 0
    for number, (ids, learned) in enumerate(samples, start=1):
        tokens[at : at + len(ids)] = ids
        segments[at : at + len(ids)] = np.where(learned, number, -number)
        at += len(ids)
    return tokens, segments
