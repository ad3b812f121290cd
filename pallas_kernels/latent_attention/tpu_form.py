"""What the forward and backward kernels on TPUs share: operands with heads before positions, tiles, the mask."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.device import LANES

LARGEST_TILE = 512  # positions; a tile of 512 x 512 logits takes 1 MB in float32
VMEM_BYTES = 64 << 20
# A row's maximum starts between a hidden logit and any visible one: see `hopper_form`.
HIDDEN, LOWEST = -1e30, -1e20

Interpret = pltpu.InterpretParams | None


class Form(NamedTuple):
    """The static properties of a call."""

    length: int  # positions, without padding
    tile: int  # positions, of queries and of keys
    scale: float
    causal: bool

    @property
    def tiles(self) -> int:
        return -(-self.length // self.tile)


def make_form(length: int, scale: float, causal: bool) -> Form:
    return Form(length, min(LARGEST_TILE, -(-length // LANES) * LANES), scale, causal)


def padded(x: Array, multiple: int, axis: int) -> Array:
    """Returns the array padded with zeros to a multiple of `multiple` positions along `axis`."""
    excess = -x.shape[axis] % multiple
    return jnp.pad(x, [(0, excess if at == axis else 0) for at in range(x.ndim)])


def by_head(x: Float[Array, "B T H c"], form: Form) -> Float[Array, "B H P c"]:
    """Returns the array with heads before positions, padded to whole tiles."""
    return padded(x.transpose(0, 2, 1, 3), form.tile, 2)


def by_position(x: Float[Array, "B H P c"], form: Form) -> Float[Array, "B T H c"]:
    return x.transpose(0, 2, 1, 3)[:, : form.length]


def ids_of(segment_ids: Int[Array, "B T"] | None, form: Form) -> list[Array]:
    """Returns the padded segment ids along lanes [B, 1, P] and along sublanes [B, P, 128]; [] for None."""
    if segment_ids is None:
        return []
    ids = padded(segment_ids.astype(jnp.int32), form.tile, 1)
    return [ids[:, None, :], jnp.broadcast_to(ids[:, :, None], (*ids.shape, LANES))]


def product(a: Array, b: Array, contract: tuple[int, int]) -> Float[Array, "rows columns"]:
    """Returns the product of two matrices over the given axes, summed in float32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def mask(logits: Array, form: Form, row_tile, column_tile, ids: list[Any], keys_in_rows: bool) -> Array:
    """Hides keys after the query, in another segment or after the last position.

    Args:
      ids: references to the segment ids of the columns [1, 1, tile] and of the rows [1, tile, 128], or [].
    """
    row = lax.broadcasted_iota(jnp.int32, logits.shape, 0) + row_tile * form.tile
    column = lax.broadcasted_iota(jnp.int32, logits.shape, 1) + column_tile * form.tile
    query, key = (column, row) if keys_in_rows else (row, column)
    visible = query >= key if form.causal else key < form.length
    if ids:
        of_rows = jnp.tile(ids[1][0], (1, form.tile // LANES))
        visible = visible & (of_rows == ids[0][0])
    return jnp.where(visible, logits, HIDDEN)


def masked_where_needed(form: Form, own, other, ids: list[Any], compute) -> None:
    """Calls compute(masked) with whether the tile needs the mask: without segments, on the diagonal or at the end."""
    if ids:
        compute(True)
        return
    needed = own == other if form.causal else (jnp.maximum(own, other) == form.tiles - 1)
    pl.when(needed)(lambda: compute(True))
    pl.when(jnp.logical_not(needed))(lambda: compute(False))
