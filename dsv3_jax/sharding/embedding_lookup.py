"""The embedding on a mesh: tokens are sent to the shards of the table, and their rows come back (report section 3.2).

The table's vocabulary is sharded over the tensor axis, its width over the fsdp and context axes. A plain lookup would
give XLA a result sharded by width where the next layer wants it sharded by tokens, and XLA all-gathers everything in
between.

In a pipeline the width is sharded over the stage axis too. In a stage's program all stages look up together, each for
tokens of its own.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from dsv3_jax.modules.parameter import ParameterShape
from dsv3_jax.sharding.ranks import on_every_rank
from dsv3_jax.sharding.rules import WITHIN_A_STAGE, AxisRules, MeshAxes, token_axes, weight_axes


def look_up_on_ranks(
    mesh: Mesh, table: Float[Array, "V d"], tokens: Int[Array, "B T"], shape: ParameterShape, dtype: jnp.dtype
) -> Float[Array, "B T d"]:
    """Returns `table[tokens]` in `dtype`, for every rank's own tokens."""
    in_a_stage = "stage" in jax.sharding.get_abstract_mesh().manual_axes
    rows, columns = weight_axes(shape, mesh, AxisRules() if in_a_stage else WITHIN_A_STAGE)
    batch = PartitionSpec(*token_axes(mesh, tokens.shape))

    def on_a_rank(table: Float[Array, "v w"], tokens: Int[Array, "b T"]) -> Float[Array, "b T d"]:
        if columns is not None:
            tokens = lax.all_gather(tokens, columns, axis=0, tiled=True)
        found = _rows_of_shard(table, tokens, rows).astype(dtype)
        if columns is not None:
            found = lax.all_to_all(found, columns, split_axis=0, concat_axis=2, tiled=True)
        return found

    lookup = on_every_rank(mesh, on_a_rank, in_specs=(PartitionSpec(rows, columns), batch), out_specs=batch)
    return lookup(table, tokens)


def _rows_of_shard(table: Float[Array, "v w"], tokens: Int[Array, "b T"], axis: MeshAxes) -> Float[Array, "b T w"]:
    """Returns the tokens' rows, of which each rank of `axis` holds some."""
    if axis is None:
        return table[tokens]
    local = tokens - lax.axis_index(axis) * table.shape[0]
    here = (local >= 0) & (local < table.shape[0])
    found = table[jnp.clip(local, 0, table.shape[0] - 1)]
    return lax.psum(jnp.where(here[..., None], found, 0), axis)
