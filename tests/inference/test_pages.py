"""Checks the page allocator as a state machine, against what its documentation promises."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dsv3_jax.inference.pages import PageAllocator, page_digests

PAGES, SIZE = 6, 2
TEXTS = st.lists(st.integers(0, 1), max_size=8).map(tuple)


class Allocation(RuleBasedStateMachine):
    """Sequences come, share, publish and go; a copy of what each page holds shows whether one is handed out wrongly."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = PageAllocator(PAGES, SIZE)
        self.sequences: list[tuple[tuple[int, ...], list[int], int]] = []  # tokens, pages, how many are shared
        self.contents: dict[int, tuple[int, ...]] = {}

    @rule(tokens=TEXTS)
    def arrive(self, tokens: tuple[int, ...]) -> None:
        shared = self.allocator.share(tokens)
        for number, page in enumerate(shared):
            assert self.contents[page] == tokens[: (number + 1) * SIZE], "a page of other tokens was shared"
        before = self.allocator.available
        wanted = -(-len(tokens) // SIZE) - len(shared)
        own = self.allocator.allocate(wanted)
        if own is None:
            assert wanted > before
            self.allocator.release(shared)
            return
        held = {page for _, pages, _ in self.sequences for page in pages} | set(shared)
        assert not held & set(own), "a page was handed out that a sequence holds"
        for number, page in enumerate(own, start=len(shared)):
            self.contents[page] = tokens[: (number + 1) * SIZE]
        self.sequences.append((tokens, shared + own, len(shared)))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        tokens, pages, _ = data.draw(st.sampled_from(self.sequences))
        self.allocator.publish(tokens, pages)
        again = self.allocator.share(tokens)
        assert len(again) == len(tokens) // SIZE
        self.allocator.release(again)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(0, len(self.sequences) - 1))
        self.allocator.release(self.sequences.pop(number)[1])

    @rule()
    def clear(self) -> None:
        self.allocator.clear()
        assert not self.allocator.share((0, 0, 1, 1))

    @invariant()
    def no_page_is_lost(self) -> None:
        assert self.allocator.held == len({page for _, pages, _ in self.sequences for page in pages})


TestAllocation = Allocation.TestCase
TestAllocation.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_unused_pages_are_evicted_oldest_first_and_from_the_end() -> None:
    allocator = PageAllocator(3, SIZE)
    for tokens in [(1, 1, 1, 1), (2, 2)]:
        pages = allocator.allocate(len(tokens) // SIZE)
        assert pages is not None
        allocator.publish(tokens, pages)
        allocator.release(pages)
    assert allocator.available == 3
    allocator.allocate(1)
    assert len(page_digests((1, 1, 1, 1), SIZE)) == 2
    assert len(allocator.share((1, 1, 1, 1))) == 1
    assert len(allocator.share((2, 2))) == 1
