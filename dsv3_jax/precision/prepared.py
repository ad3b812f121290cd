"""Rows with what was prepared of them before the linear map that multiplies them."""

from __future__ import annotations

import abc
import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsv3_jax.precision.tiles import Tiles


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedRows(PreparedRows):
    """Rows that are in FP8 already: the output of an RMSNorm, or tokens that were sent to their experts.

    Attributes:
      tiles: the rows [*batch, d] in FP8, with scales for each row; they carry no gradient.
      rows: an array [*batch, d] that gets the gradient of the rows. Its values may be zeros that nothing may read.
    """

    tiles: Tiles
    rows: Float[Array, "*batch d"]

    @classmethod
    def of(cls, tiles: Tiles, dtype: jnp.dtype) -> QuantizedRows:
        """Returns rows whose gradient is of `dtype`."""
        return cls(tiles, jnp.zeros(tiles.values.shape, dtype))

    @staticmethod
    def parts(rows: Float[Array, "*batch d"] | QuantizedRows) -> tuple[Float[Array, "*batch d"], Tiles | None]:
        """Returns the array of rows that gets the gradient, and the tiles if there are any."""
        return (rows.rows, rows.tiles) if isinstance(rows, QuantizedRows) else (rows, None)

    @staticmethod
    def joined(rows: Float[Array, "*batch d"], tiles: Tiles | None) -> Float[Array, "*batch d"] | QuantizedRows:
        """Returns the rows whose `parts` these are."""
        return rows if tiles is None else QuantizedRows(tiles, rows)

    def reshape(self, *shape: int) -> QuantizedRows:
        """Returns the same rows with other batch axes."""
        rows = self.rows.reshape(*shape)
        tiles = jax.tree.map(lambda part: part.reshape(*rows.shape[:-1], part.shape[-1]), self.tiles)
        return QuantizedRows(tiles, rows)
