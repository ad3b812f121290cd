"""Which sequence has which pages of the cache: allocation, sharing of equal beginnings, eviction. No arrays.

A page that is full and will not change any more may be published under a digest of all tokens up to its end. A later
sequence that begins with the same tokens is given the same page. Published pages that no sequence uses keep their
contents until their memory is needed; the one unused for longest is taken first.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np


class PageAllocator:
    """Hands out `count` pages of `page_size` tokens. A page is free, held by sequences, or unused but still published.

    Attributes:
      count: number of pages.
      page_size: tokens per page.
    """

    def __init__(self, count: int, page_size: int):
        self.count = count
        self.page_size = page_size
        self._free = list(range(count - 1, -1, -1))
        self._holders = [0] * count
        self._digest_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Number of pages that `allocate` can hand out."""
        return len(self._free) + len(self._unused)

    @property
    def held(self) -> int:
        """Number of pages that sequences hold."""
        return self.count - self.available

    def allocate(self, number: int) -> list[int] | None:
        """Returns pages that the caller holds alone, or None if there are not that many."""
        if number > self.available:
            return None
        pages = []
        for _ in range(number):
            if not self._free:
                oldest, _ = self._unused.popitem(last=False)
                del self._page_of[self._digest_of.pop(oldest)]
                self._free.append(oldest)
            page = self._free.pop()
            self._holders[page] = 1
            pages.append(page)
        return pages

    def release(self, pages: Sequence[int]) -> None:
        """Gives up one hold on each page. A page nobody holds is free, or stays published until it is needed."""
        # Backwards: of an unused beginning, the last page is evicted first, since it is useless without those before.
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if page in self._digest_of:
                self._unused[page] = None
            else:
                self._free.append(page)

    def share(self, tokens: Sequence[int]) -> list[int]:
        """Returns the published pages of the longest beginning of `tokens`; the caller now holds them too."""
        pages = []
        for digest in page_digests(tokens, self.page_size):
            page = self._page_of.get(digest)
            if page is None:
                break
            self._holders[page] += 1
            self._unused.pop(page, None)
            pages.append(page)
        return pages

    def publish(self, tokens: Sequence[int], pages: Sequence[int]) -> None:
        """Makes the full pages of `tokens` available to others; what another page is already published for is not."""
        for digest, page in zip(page_digests(tokens, self.page_size), pages, strict=False):
            if digest not in self._page_of and page not in self._digest_of:
                self._page_of[digest] = page
                self._digest_of[page] = digest

    def clear(self) -> None:
        """Withdraws all published pages, for example after the weights changed."""
        self._page_of.clear()
        self._digest_of.clear()
        self._free.extend(self._unused)
        self._unused.clear()


def page_digests(tokens: Sequence[int], page_size: int) -> list[bytes]:
    """Returns one digest per full page, each of all tokens up to the page's end."""
    ids = np.asarray(tokens, np.int32)
    digests, digest = [], b""
    for end in range(page_size, len(ids) + 1, page_size):
        digest = hashlib.blake2b(digest + ids[end - page_size : end].tobytes(), digest_size=16).digest()
        digests.append(digest)
    return digests
