"""Which ranks of the expert axis send to one another: one hop, or two where a group of experts has several ranks."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class HopRanks:
    """The ranks of one hop.

    Attributes:
      ranks: of the whole axis.
      peers: of them that exchange rows; `stride` ranks lie from one to the next.
      reached: of the peers by one row at most; None where that may be all.
    """

    ranks: int
    peers: int
    stride: int = 1
    reached: int | None = None

    @property
    def groups(self) -> list[list[int]] | None:
        """Every set of peers, if there are several."""
        if self.peers == self.ranks:
            return None
        span = self.peers * self.stride
        starts = [first + place for first in range(0, self.ranks, span) for place in range(self.stride)]
        return [list(range(start, start + span, self.stride)) for start in starts]

    def copies(self, chosen: int) -> int:
        """Rows to send, at most, for one that is for so many experts."""
        return min(chosen, self.peers, self.reached or self.peers)


def hops_between(ranks: int, groups: int, reached: int | None = None) -> tuple[HopRanks, ...]:
    """How a token gets to its experts' ranks (report section 3.2.2); no hop where one rank has them all.

    Args:
      groups: of experts, in the order of the ranks.
      reached: groups that a token has experts of, at most; None where the experts do not lie in the router's order.
    """
    if ranks == 1:
        return ()
    if groups == 1 or max(ranks, groups) % min(ranks, groups):
        return (HopRanks(ranks=ranks, peers=ranks),)
    if ranks <= groups:  # a rank has whole groups
        return (HopRanks(ranks=ranks, peers=ranks, reached=reached),)
    places = ranks // groups
    across = HopRanks(ranks=ranks, peers=groups, stride=places, reached=reached)
    return across, HopRanks(ranks=ranks, peers=places)
