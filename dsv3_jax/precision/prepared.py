"""Rows with what was prepared of them before the linear map that multiplies them."""

from __future__ import annotations

import abc
from typing import Self

from jaxtyping import Array, Float


class PreparedRows(abc.ABC):
    """Rows that linear maps read as they read an array, with the same rows in another format beside them.

    Attributes:
      rows: [*batch, *in]; they get the gradient.
    """

    rows: Float[Array, "..."]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the rows."""
        return self.rows.shape

    @property
    def ndim(self) -> int:
        """The number of axes of `shape`."""
        return self.rows.ndim

    @abc.abstractmethod
    def reshape(self, *shape: int) -> Self:
        """Returns the same rows under another shape; one size may be -1."""
        ...
