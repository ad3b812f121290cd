"""What the forward and backward kernels on Hopper share: the parts of queries and keys, tile sizes, the mask."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.hopper_launch import pad_to
from pallas_kernels.latent_attention.operands import Operands
from pallas_kernels.latent_attention.tiles import SEVERAL_OF_KEYS, SEVERAL_OF_QUERIES, one_segment

CONSUMERS = 2
PRODUCER = 2  # the third warpgroup
PRODUCER_REGISTERS = 24
CONSUMER_REGISTERS = 240
ROWS = 64  # of a consumer
TILE = CONSUMERS * ROWS

# A row's maximum starts between a hidden logit and any visible one, so that the weights of hidden keys are zero also
# while a row has seen no visible key; infinities would make NaN of them.
HIDDEN, LOWEST = -1e30, -1e20
LOG2_E = math.log2(math.e)
BY_ROW = plgpu.Layout.WGMMA.reduce(1)
BY_COLUMN = plgpu.Layout.WGMMA.reduce(0)

Interpret = plgpu.InterpretGPUParams | None


class Part(NamedTuple):
    """Columns of the queries and of the keys: [column, column + width) of the queries, [key_column, ...) of `keys`."""

    column: int
    width: int
    shared: bool  # whether all heads have the same keys: the rotary part of MLA
    key_column: int
    alike: int  # columns of the widest swizzle that the arrays and the part allow

    def of_queries(self, q, batch, rows, head):
        return q.at[batch, rows, head, pl.ds(self.column, self.width)]

    def of_keys(self, k, k_shared, batch, rows, head):
        columns = pl.ds(self.key_column, self.width)
        return k_shared.at[batch, rows, columns] if self.shared else k.at[batch, rows, head, columns]


class Form(NamedTuple):
    """The static properties of a call."""

    length: int  # positions, without padding
    parts: tuple[Part, ...]
    value_width: int
    scale: float
    causal: bool
    segmented: bool

    @property
    def exponent(self) -> float:
        """The factor of a logit in the exponent of 2."""
        return self.scale * LOG2_E


def make_form(x: Operands, scale: float, causal: bool) -> Form:
    """Returns the form of a call; the first part has the width of the values where it can."""
    own, value_width = x.k.shape[-1], x.v.shape[-1]
    first = value_width if own > value_width else own
    width = x.q.shape[-1]
    parts = [Part(0, first, False, 0, math.gcd(first, own, width, value_width))]
    if own > first:
        parts.append(Part(first, own - first, False, first, math.gcd(first, own, width)))
    if x.k_shared is not None:
        parts.append(Part(own, width - own, True, 0, math.gcd(own, width)))
    return Form(x.q.shape[1], tuple(parts), value_width, scale, causal, x.segment_ids is not None)


def segment_tables(segment_ids: Int[Array, "B T"] | None, queries: int, keys: int) -> list[Array]:
    """Returns the padded segment ids and the segments of tiles of `queries` and `keys` positions; [] for None."""
    if segment_ids is None:
        return []
    return [
        pad_to(segment_ids.astype(jnp.int32), TILE),
        one_segment(segment_ids, queries, SEVERAL_OF_QUERIES),
        one_segment(segment_ids, keys, SEVERAL_OF_KEYS),
    ]


def mask(logits: Float[Array, "rows columns"], form: Form, row, column, ids, keys_in_rows: bool = False) -> Array:
    """Hides keys after the query, in another segment or after the last position.

    Args:
      row, column: the positions of the first row and column.
      ids: reference to the segment ids of the sequence in global memory, or None.
      keys_in_rows: whether rows are keys and columns queries.
    """
    # Added here, so that the compiler does not keep a register for each column during the whole kernel.
    at_row = plgpu.broadcasted_iota(jnp.int32, logits.shape, 0, layout=plgpu.Layout.WGMMA) + row
    at_column = plgpu.broadcasted_iota(jnp.int32, logits.shape, 1, layout=plgpu.Layout.WGMMA) + column
    query, key = (at_column, at_row) if keys_in_rows else (at_row, at_column)
    conditions = []
    if form.causal:
        conditions.append(query >= key)
    elif form.length % TILE:
        conditions.append(key < form.length)
    if ids is not None:
        rows, columns = logits.shape
        by_row = plgpu.load(ids.at[pl.ds(row, rows)], layout=BY_ROW, optimized=False)
        by_column = plgpu.load(ids.at[pl.ds(column, columns)], layout=BY_COLUMN, optimized=False)
        conditions.append(over_columns(by_row, logits.shape) == over_rows(by_column, logits.shape))
    for condition in conditions:
        logits = jnp.where(condition, logits, HIDDEN)
    return logits


def over_columns(rows: Array, shape: tuple[int, ...]) -> Array:
    return lax.broadcast_in_dim(rows, shape, (0,))


def over_rows(columns: Array, shape: tuple[int, ...]) -> Array:
    return lax.broadcast_in_dim(columns, shape, (1,))


def transposed(ref):
    return ref.transpose((1, 0))
