"""Checks packing against rows that are cut from a plain list of tokens."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.data.packing import pack_row, row_count

PADDING = -1


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=12), sequence_length=st.integers(1, 9))
def test_rows_are_those_cut_by_hand(lengths: list[int], sequence_length: int) -> None:
    documents = [[100 * number + position for position in range(size)] for number, size in enumerate(lengths)]
    stream = [token for document in documents for token in document]
    owner = [number for number, size in enumerate(lengths) for _ in range(size)]
    borders = np.cumsum([0, *lengths])
    rows = [
        pack_row(
            index,
            borders,
            lambda document, start, stop: np.array(documents[document][start:stop]),
            sequence_length,
            PADDING,
        )
        for index in range(row_count(len(stream), sequence_length))
    ]
    targets = []
    for index, (tokens, segments) in enumerate(rows):
        start = index * sequence_length
        expected = stream[start : start + sequence_length + 1]
        owners = owner[start : start + sequence_length + 1]
        missing = sequence_length + 1 - len(expected)
        assert tokens.tolist() == expected + [PADDING] * missing
        assert segments.tolist() == [1 + number - owners[0] for number in owners] + [0] * missing
        assert tokens.dtype == segments.dtype == np.int32
        targets += tokens[1:][segments[1:] > 0].tolist()
    assert targets == stream[1:]
