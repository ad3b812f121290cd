"""The embedding on a mesh: tokens go to the parts of the table, and their rows come back (report section 3.2).

The table's vocabulary is cut over the tensor axis and its width over the fsdp axis. A plain lookup would leave XLA with
a result cut by width where the next layer wants it cut by sequence, and it gathers everything everywhere in between.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from dsv3_jax.sharding.ranks import on_every_rank
from dsv3_jax.sharding.rules import BATCH_AXES, WITHIN_A_STAGE, parameter_specs


@dataclasses.dataclass(frozen=True)
class LookupOnRanks:
    """`table[tokens]` for every rank's own sequences.

    Attributes:
      rows, columns: mesh axes of the table's two dimensions.
    """

    mesh: Mesh
    rows: str | None
    columns: str | None

    @classmethod
    def of(cls, mesh: Mesh, table: Any) -> LookupOnRanks:
        """For a table of that shape."""
        cut = parameter_specs({"embedding": {"weight": table}}, mesh, WITHIN_A_STAGE)["embedding"]["weight"]
        rows, columns = (*cut, None, None)[:2]
        return cls(mesh, rows, columns)

    def __call__(
        self, table: Float[Array, "V d"], tokens: Int[Array, "B T"], dtype: jnp.dtype
    ) -> Float[Array, "B T d"]:
        rows, columns, batch = self.rows, self.columns, PartitionSpec(BATCH_AXES)

        def on_a_rank(table: Float[Array, "v w"], tokens: Int[Array, "b T"]) -> Float[Array, "b T d"]:
            if columns is not None:
                tokens = lax.all_gather(tokens, columns, axis=0, tiled=True)
            found = _rows_of_part(table, tokens, rows).astype(dtype)
            if columns is not None:
                found = lax.all_to_all(found, columns, split_axis=0, concat_axis=2, tiled=True)
            return found

        lookup = on_every_rank(self.mesh, on_a_rank, in_specs=(PartitionSpec(rows, columns), batch), out_specs=batch)
        return lookup(table, tokens)


def _rows_of_part(table: Float[Array, "v w"], tokens: Int[Array, "b T"], axis: str | None) -> Float[Array, "b T w"]:
    """The rows, of which each rank of `axis` has some."""
    if axis is None:
        return table[tokens]
    local = tokens - lax.axis_index(axis) * table.shape[0]
    here = (local >= 0) & (local < table.shape[0])
    found = table[jnp.clip(local, 0, table.shape[0] - 1)]
    return lax.psum(jnp.where(here[..., None], found, 0), axis)
