"""Checks which checkpoints are deleted: whatever is saved, damaged and resumed, no good one is lost."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from dsv3_jax.runs.retention import superseded

_EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("save"), st.integers(1, 3)),  # so many steps further
        st.tuples(st.just("damage"), st.integers(0, 5)),  # counted from the newest
        st.tuples(st.just("resume"), st.integers(1, 4)),  # with another number to keep
        st.tuples(st.just("repair"), st.integers(0, 5)),  # a disk that can be read again
    ),
    max_size=30,
)


@given(_EVENTS, st.integers(1, 4))
def test_the_newest_whole_checkpoints_survive_every_sequence_of_events(events: list[tuple[str, int]], keep: int):
    """A run saves, is killed and resumed, while its checkpoints are damaged and can be read again."""
    whole: dict[int, bool] = {}  # by step
    position = 0
    for kind, number in events:
        newest_first = sorted(whole, reverse=True)
        if kind == "save":
            position += number
            before = {step for step, good in whole.items() if good} | {position}
            whole[position] = True
            deleted = superseded(list(whole), position, keep, whole.__getitem__)
            for step in deleted:
                del whole[step]
            survivors = {step for step, good in whole.items() if good}
            assert position in survivors, "what was just saved is there"
            assert set(sorted(before)[-keep:]) <= survivors, "damaged ones do not count"
            assert len(survivors) <= keep + 1, "old ones are deleted"
        elif kind == "resume":
            keep = number
            position = max((step for step, good in whole.items() if good), default=0)
        elif number < len(newest_first):
            whole[newest_first[number]] = kind == "repair"


@given(st.sets(st.integers(0, 30), min_size=1), st.integers(1, 5), st.data())
def test_against_the_definition(present: set[int], keep: int, data: st.DataObject):
    saved = data.draw(st.sampled_from(sorted(present)))
    bad = data.draw(st.sets(st.sampled_from(sorted(present)))) - {saved}
    good = sorted(present - bad)
    expected = [step for step in sorted(present) if len(good) >= keep and step < good[-keep] and step != saved]
    assert superseded(present, saved, keep, lambda step: step not in bad) == expected


def test_no_more_checkpoints_are_read_than_needed():
    """Reading a checkpoint to compare its digests takes long."""
    asked = []
    counter = itertools.count()

    def is_whole(step: int) -> bool:
        asked.append(step)
        return next(counter) > 0  # the first is damaged

    assert superseded([1, 2, 3, 4, 5, 6], 6, 3, is_whole) == [1, 2]
    assert asked == [5, 4, 3]
