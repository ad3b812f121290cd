"""Says which ranks of the expert axis exchange rows, in how many pieces, and for how many rows they have memory.

There is one hop, or two where a group of experts spans several ranks (report section 3.2.2).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class HopRanks:
    """The ranks that take part in one exchange.

    Attributes:
      ranks: number of ranks of the expert axis.
      peers: number of ranks in each set that exchanges rows.
      stride: distance along the axis from one peer to the next.
      reached: the most peers that one row is sent to; None where it may be all of them.
    """

    ranks: int
    peers: int
    stride: int = 1
    reached: int | None = None

    @property
    def groups(self) -> list[list[int]] | None:
        """Returns every set of peers, or None where all ranks are one set."""
        if self.peers == self.ranks:
            return None
        span = self.peers * self.stride
        starts = [first + offset for first in range(0, self.ranks, span) for offset in range(self.stride)]
        return [list(range(start, start + span, self.stride)) for start in starts]

    def copies(self, chosen: int) -> int:
        """Returns the most copies of a row that is for `chosen` experts."""
        return min(chosen, self.peers, self.reached or self.peers)


SPARE = 1.5
"""The rows that a rank has for each sender, over those that arrive under an even load."""

_FEWEST_ROWS = 16  # for each sender on the last hop, such as when a few tokens are decoded

SELDOM = "beyond_an_even_load"
"""Named scope of what is computed and sent only where more rows arrive than there is memory for."""

_PIECES_PER_HOP = 8  # with fewer, less of the exchange is beside products; with more, products are smaller


def pieces_of(tokens: int, hops: int) -> int:
    """Returns into how many equal pieces a rank's tokens are divided, so that products hide the exchange of others."""
    wanted = _PIECES_PER_HOP * hops
    return next(pieces for pieces in range(min(wanted, tokens), tokens + 1) if tokens % pieces == 0)


def rows_per_sender(hops: Sequence[HopRanks], tokens: int, chosen: int) -> list[int]:
    """Returns for every hop the most rows that a rank sends to another in one round.

    The last hop has `SPARE` times those of an even load, or a few if that is less, because few rows are never even. All
    others have as many rows as can arrive at all.

    Args:
      tokens: number of tokens of a rank.
      chosen: number of experts of a token.
    """
    found, arriving, copies = [], tokens, 1
    for hop in hops:
        copies = min(copies * hop.copies(chosen), chosen)
        found.append(arriving)
        arriving *= hop.peers
    if found:
        found[-1] = min(found[-1], max(-(-int(SPARE * tokens * copies) // hops[-1].peers), _FEWEST_ROWS))
    return found


def rows_of_block(even_load: int, experts: int, alignment: int) -> int:
    """Returns how many rows of a rank's experts are multiplied at once: an even load, a quarter more, and padding."""
    return (-(-even_load * 5 // (4 * alignment)) + experts) * alignment


def hops_between(ranks: int, groups: int, reached: int | None = None) -> tuple[HopRanks, ...]:
    """Returns the exchanges that bring a token to its experts (report section 3.2.2); none for a single rank.

    Args:
      ranks: number of ranks of the expert axis.
      groups: number of groups of experts, which follow the order of the ranks.
      reached: the most groups that a token's experts belong to; None where experts do not follow the router's order.
    """
    if ranks == 1:
        return ()
    if groups == 1 or max(ranks, groups) % min(ranks, groups):
        return (HopRanks(ranks=ranks, peers=ranks),)
    if ranks <= groups:  # a rank has whole groups
        return (HopRanks(ranks=ranks, peers=ranks, reached=reached),)
    ranks_of_group = ranks // groups
    across = HopRanks(ranks=ranks, peers=groups, stride=ranks_of_group, reached=reached)
    return across, HopRanks(ranks=ranks, peers=ranks_of_group)
