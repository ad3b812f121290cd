"""What the two kernels of the backward pass on Hopper are made for: their plan, their operands and their tiles."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from jaxtyping import Array

from pallas_kernels.hopper_launch import SHARED_MEMORY_BYTES
from pallas_kernels.latent_attention.hopper_form import TILE, Form

MOST_ROWS = 192  # of the other side in the ring

Side = Literal["queries", "keys"]


class Plan(NamedTuple):
    """The static properties of one of the two kernels.

    Attributes:
      side: what the block's own rows are.
      other: rows of the other side in a stage.
      heads: heads that a block computes one after the other, with one sum for the keys that they share.
    """

    form: Form
    side: Side
    other: int
    heads: int = 1

    @property
    def shares(self) -> bool:
        return self.side == "keys" and any(part.shared for part in self.form.parts)

    @property
    def stages(self) -> int:
        width = sum(part.width for part in self.form.parts) + self.form.value_width
        stage_bytes = self.other * (width * 2 + 8)
        return min((SHARED_MEMORY_BYTES - TILE * width * 2 - 4096) // stage_bytes, MOST_ROWS // self.other)


class Arrays(NamedTuple):
    """The operands in global memory."""

    q: Any
    k: Any
    v: Any
    gradient: Any
    log_sums: Any
    mean: Any
    k_shared: Any

    def of(self, side: Side, form: Form, batch, rows, head) -> list[Any]:
        """Returns the parts of queries or keys, then the gradients of attended values or the values."""
        if side == "queries":
            parts = [part.of_queries(self.q, batch, rows, head) for part in form.parts]
            return [*parts, self.gradient.at[batch, rows, head]]
        parts = [part.of_keys(self.k, self.k_shared, batch, rows, head) for part in form.parts]
        return [*parts, self.v.at[batch, rows, head]]


class Tile(NamedTuple):
    """One tile of own rows and its range of tiles of the other side, for several heads."""

    batch: Array
    group: Array  # of heads
    index: Array
    first: Array  # tile of the other side
    count: Array  # of tiles of the other side
    steps_before: Array  # in this block

    def other(self, plan: Plan, t):
        """Returns the t-th tile of the other side: first those on the diagonal."""
        return self.first + (self.count - 1 - t if plan.side == "queries" else t)
