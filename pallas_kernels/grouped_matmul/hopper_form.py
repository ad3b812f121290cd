"""What a grouped product on Hopper is made for: the layout of its operands, and the tiles of its result."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array

from pallas_kernels.grouped_matmul.tiling import STAGE_BYTES, Groups


class Form(NamedTuple):
    """The static properties of a product.

    Attributes:
      groups: whether groups are along the rows of the left operand or along the contraction (depth).
      fp8: operands in e4m3 with scales.
      row_major: the right operand is [contraction, columns] in memory, else [columns, contraction].
      masked: rows past the count of a tile are set to zero.
      accumulates: the product is added to an array that is given.
      in_parts: the rows of the contraction come in parts, each sorted by group.
    """

    groups: Groups
    fp8: bool
    row_major: bool = False
    masked: bool = False
    accumulates: bool = False
    in_parts: bool = False

    @property
    def depth(self) -> int:
        """The size of the contraction in one stage."""
        return STAGE_BYTES if self.fp8 else STAGE_BYTES // 2

    @property
    def a_row_major(self) -> bool:
        """Whether the left operand is [contraction, rows] in memory."""
        return self.groups == "depth" and not self.fp8


class Tile(NamedTuple):
    """The operands and the number of steps of one tile."""

    group: Array
    row: Array
    column: Array
    first_step: Array
    steps: Array
    rows_present: Array
