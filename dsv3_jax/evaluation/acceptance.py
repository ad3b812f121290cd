"""How many drafts of the MTP module are accepted when the engine writes texts (report section 5.4.3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from dsv3_jax.errors import UserError
from dsv3_jax.inference import Engine, Request


@dataclasses.dataclass(frozen=True)
class DraftCounts:
    """The numbers of drafts that were offered and accepted.

    In each step the MTP module drafts tokens at depths 1, 2, ... A draft is offered if it is checked: all drafts of
    smaller depth in its step were accepted, and the text goes on to its token.

    Attributes:
      offered, accepted: by position in the answer of the token that the draft is for, counted from 0, and by depth.
    """

    offered: Int[np.ndarray, "positions depths"]
    accepted: Int[np.ndarray, "positions depths"]

    @property
    def by_depth(self) -> Float[np.ndarray, " depths"]:
        """The share of the offered drafts of each depth that was accepted; NaN where none was offered."""
        return _shares(self.offered.sum(axis=0), self.accepted.sum(axis=0))

    @property
    def tokens_per_step(self) -> float:
        """Mean number of tokens that a step writes: one, and the accepted drafts. NaN where there was no step."""
        return 1 + float(_shares(self.offered[:, 0].sum(), self.accepted.sum()))

    def groups_of_positions(self) -> tuple[tuple[int, ...], Float[np.ndarray, "groups depths"]]:
        """Returns the first position of each group of positions (0, 1, 2, 4, 8 ...) and the accepted shares there."""
        count = len(self.offered)
        firsts = [first for first in (0, *(2**power for power in range(count.bit_length()))) if first < count]
        sums = (np.add.reduceat(each, np.asarray(firsts, int), axis=0) for each in (self.offered, self.accepted))
        return tuple(firsts), _shares(*sums)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON: the counts by depth and by position."""
        return {"offered": self.offered.tolist(), "accepted": self.accepted.tolist()}


def measure_acceptance(engine: Engine, requests: Iterable[Request]) -> DraftCounts:
    """Serves requests with an engine that drafts, and returns the counts of their drafts.

    Requests of one kind, such as those about one topic, make one measurement. Positions that no text reaches are left
    out; `EngineConfig.drafts` is the number of depths.

    Raises:
      UserError: the engine does not draft, or cannot serve a request.
    """
    if not engine.drafts:
        raise UserError("drafts cannot be counted: the engine has none, which need a model with an MTP module")
    return count_drafts([result.drafted for result in engine.run(requests)], engine.drafts)


def count_drafts(texts: Sequence[Sequence[bool]], depths: int) -> DraftCounts:
    """Returns the counts of drafts from what the engine says of each token of some texts.

    A step writes accepted drafts and then one token that is none; the step that ends a text may lack the latter. So the
    flags of a text alone tell where each step began.

    Args:
      texts: for each token of each text, whether it was an accepted draft (`Output.drafted`).
      depths: number of drafts in a step.
    """
    shape = (max(map(len, texts), default=0), depths)
    offered, accepted = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for drafted in texts:
        depth = 0
        for position, flag in enumerate(drafted):
            if depth < depths:
                offered[position, depth] += 1
                accepted[position, depth] += flag
            depth = depth + 1 if flag else 0
    return DraftCounts(offered, accepted)


def _shares(offered: Any, accepted: Any) -> Float[np.ndarray, "..."]:
    return np.where(np.asarray(offered) > 0, accepted / np.maximum(offered, 1), np.nan)
