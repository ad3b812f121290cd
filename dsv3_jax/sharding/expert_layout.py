"""Which ranks of the expert axis exchange rows: one hop, or two where a group of experts spans several ranks."""

from __future__ import annotations

import dataclasses


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


BUFFER_ROWS = 2
"""The most rows of a piece's receive buffers, over the rows of all of a rank's tokens under an even load."""


def pieces_of(tokens: int, ranks: int, chosen: int, experts: int, *, fewest: int = 1) -> int:
    """Returns into how many equal pieces a rank's tokens are divided, so that receive buffers keep to `BUFFER_ROWS`.

    Args:
      ranks: number of ranks of the expert axis.
      chosen, experts: number of experts of a token, and of a rank.
      fewest: the fewest pieces wanted.
    """
    wanted = max(-(-ranks * min(chosen, experts) // (BUFFER_ROWS * chosen)), fewest)
    return next(pieces for pieces in range(min(wanted, tokens), tokens + 1) if tokens % pieces == 0)


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
