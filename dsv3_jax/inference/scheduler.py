"""Which requests run in the next step, with which pages. Pure host logic: no arrays, no model.

Requests wait in order of arrival. One is admitted when a slot is free and there are pages for its tokens so far; its
prompt is then read in chunks, all but the last token, and after that it gets tokens in every step. When pages run out,
the youngest running request is put back to the front of the queue; its tokens are kept and read again later.
"""

from __future__ import annotations

import dataclasses
from collections import deque

from dsv3_jax.inference.pages import PageAllocator
from dsv3_jax.inference.requests import Request, TokenLogprobs


@dataclasses.dataclass(eq=False)
class Sequence:
    """A request on its way through the engine.

    Attributes:
      number: order of arrival; the request's id.
      tokens: the prompt and the tokens written so far.
      slot: index of its state on the device; -1 while it waits.
      pages: the pages it holds, in the order of positions.
      read: number of tokens that are in the cache. All but the last are before the request gets tokens.
      valid: number of last tokens that the MTP module has not read with the main model's hidden states.
      scores: those of the prompt's tokens that have been read; None if they are not wanted or have been reported.
    """

    number: int
    request: Request
    tokens: list[int]
    slot: int = -1
    pages: list[int] = dataclasses.field(default_factory=list)
    read: int = 0
    valid: int = 0
    scores: list[TokenLogprobs] | None = None

    @property
    def is_reading(self) -> bool:
        """Whether part of its prompt has still to be read."""
        return self.read < len(self.tokens) - 1

    @property
    def final_length(self) -> int:
        """Number of tokens it has at most in the end."""
        return len(self.request.prompt) + self.request.max_new_tokens

    @property
    def remaining(self) -> int:
        """Number of tokens it may still write."""
        return self.final_length - len(self.tokens)


class Scheduler:
    """Keeps the queue, the slots and the pages.

    Args:
      allocator: the pages.
      slots: most requests that run at a time.
      drafts: tokens that the MTP module drafts per step.
      reuse_prefixes: whether equal beginnings share pages.
    """

    def __init__(self, allocator: PageAllocator, slots: int, drafts: int, *, reuse_prefixes: bool = True):
        self.allocator = allocator
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self.preemptions = 0
        self.reused_tokens = 0
        self._free_slots = list(range(slots - 1, -1, -1))
        self._drafts = drafts
        self._reuse = reuse_prefixes

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self.running or sequence in self.waiting

    def add(self, sequence: Sequence) -> None:
        """Puts a new request at the end of the queue."""
        self.waiting.append(sequence)

    def admit(self) -> list[Sequence]:
        """Gives slots and pages to waiting requests, in order, as far as there are any; returns those admitted."""
        admitted = []
        while self.waiting and self._free_slots:
            sequence = self.waiting[0]
            known = sequence.tokens[:-1]
            # A token has a score if the one before it is read, not shared.
            shareable = known if sequence.scores is None else known[: (sequence.request.score_from or 1) - 1]
            shared = self.allocator.share(shareable) if self._reuse else []
            needed = self._pages_for(min(len(sequence.tokens), sequence.final_length - 1))
            own = self.allocator.allocate(needed - len(shared))
            if own is None:
                self.allocator.release(shared)
                break
            self.waiting.popleft()
            sequence.pages = shared + own
            sequence.slot = self._free_slots.pop()
            sequence.read = len(shared) * self.allocator.page_size
            sequence.valid = min(len(known), 1)
            self.reused_tokens += sequence.read
            if self._drafts:
                # The MTP module needs the main model's hidden state of the last shared token: that token is read again.
                sequence.read = max(sequence.read - 1, 0)
            self.running.append(sequence)
            self.running.sort(key=lambda each: each.number)
            admitted.append(sequence)
        return admitted

    def to_read(self, most: int) -> list[Sequence]:
        """Returns up to `most` requests whose prompts are read next, oldest first."""
        return [sequence for sequence in self.running if sequence.is_reading][:most]

    def to_write(self, steps: int) -> tuple[list[Sequence], int]:
        """Returns the requests that get tokens, with pages for them, and for how many steps.

        Requests may be put back for it: those that are not returned and not in `running` any more.
        """
        ready = [sequence for sequence in self.running if not sequence.is_reading]
        missing = sum(self._missing(sequence, steps) for sequence in ready)
        if missing > self.allocator.available:
            steps = 1
        chosen: list[Sequence] = []
        for sequence in ready:
            while sequence in self.running:
                pages = self.allocator.allocate(self._missing(sequence, steps))
                if pages is not None:
                    sequence.pages += pages
                    chosen.append(sequence)
                    break
                self._put_back(self.running[-1])
                self.preemptions += 1
        return [sequence for sequence in chosen if sequence in self.running], steps

    def start_again(self) -> None:
        """Puts all running requests back and withdraws all published pages: the weights have changed."""
        while self.running:
            self._put_back(self.running[-1])
        self.allocator.clear()

    def have_read(self, sequences: list[Sequence], length: int) -> int:
        """Notes that up to `length` tokens of each sequence were read, and returns how many were in all.

        Other requests may share the pages of a prompt that has been read to its end.
        """
        before = sum(sequence.read for sequence in sequences)
        for sequence in sequences:
            sequence.read = min(sequence.read + length, len(sequence.tokens) - 1)
            if not sequence.is_reading:
                self._publish(sequence)
        return sum(sequence.read for sequence in sequences) - before

    def has_room(self, sequence: Sequence) -> bool:
        """Returns whether a slot and pages are free for a sequence of another scheduler."""
        return bool(self._free_slots) and self._pages_for(len(sequence.tokens)) <= self.allocator.available

    def remove(self, sequence: Sequence) -> None:
        """Frees the slot and the pages of a request that has ended or is cancelled, wherever it is."""
        if sequence in self.running:
            self._leave(sequence)
        else:
            self.waiting.remove(sequence)

    def _put_back(self, sequence: Sequence) -> None:
        self._leave(sequence)
        self.waiting.appendleft(sequence)

    def _leave(self, sequence: Sequence) -> None:
        self._publish(sequence)
        self.running.remove(sequence)
        self._free_slots.append(sequence.slot)
        self.allocator.release(sequence.pages)
        sequence.slot, sequence.pages, sequence.read = -1, [], 0
        sequence.scores = None if sequence.scores is None else []

    def _publish(self, sequence: Sequence) -> None:
        if not self._reuse:
            return
        # The MTP module's entries of the last tokens may still be those of its own drafts.
        written = len(sequence.tokens) > len(sequence.request.prompt)
        final = sequence.read - self._drafts - 1 if self._drafts and written else sequence.read
        self.allocator.publish(sequence.tokens[: max(final, 0)], sequence.pages)

    def _missing(self, sequence: Sequence, steps: int) -> int:
        read = min(len(sequence.tokens) - 1 + steps * (1 + self._drafts), sequence.final_length - 1)
        return max(self._pages_for(read) - len(sequence.pages), 0)

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.allocator.page_size)
