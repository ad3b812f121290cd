"""`OnMesh`: what a model asks of its devices, on the sharded arrays of a mesh (report section 3.2).

Weights kept in FP8 as published (`Fp8Weight`) are dequantized before they enter a rank's program: shards of a weight do
not end at the borders of its blocks of 128 x 128. One device multiplies by the stored values themselves, and so does a
pipeline stage, whose working weights are whole along the axes of a layer (`pipeline.weights`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

import pallas_kernels
from dsv3_jax.modules.attention_core import CoreAttention
from dsv3_jax.modules.devices import ExpertShapes
from dsv3_jax.modules.parameter import ParameterShape
from dsv3_jax.precision.attended import AttendedRows
from dsv3_jax.precision.expert_networks import ExpertNetworks
from dsv3_jax.precision.fp8_weight import Fp8Weight
from dsv3_jax.precision.prepared import PreparedRows
from dsv3_jax.sharding.attention_on_ranks import attend_on_ranks, attend_to_pages_on_ranks
from dsv3_jax.sharding.embedding_lookup import look_up_on_ranks
from dsv3_jax.sharding.expert_parallel import ExpertExchange
from dsv3_jax.sharding.gate_on_ranks import gate_on_ranks
from dsv3_jax.sharding.linear_on_ranks import multiply_on_ranks
from dsv3_jax.sharding.ranks import on_every_rank, sum_over_batch
from dsv3_jax.sharding.rules import BATCH_AXES, CONTEXT, Tree, rules_over_stages, shardings, token_axes


@dataclasses.dataclass(frozen=True)
class OnMesh:
    """The devices of a mesh. Tokens are sharded over the batch axes and the context axis; weights as `shardings` says.

    Attributes:
      mesh: a mesh with all axes of `dsv3_jax.sharding.mesh.AXES`.
      layers: how many MoE layers each pipeline stage holds; one number without stages, or none.
      overlap: whether a piece of a rank's tokens is sent to experts while the piece before it is multiplied.
    """

    mesh: Mesh
    layers: tuple[int, ...] = ()
    overlap: bool = False

    def multiply(
        self,
        product: Callable[[Any, Array], Array],
        x: Float[Array, "..."] | PreparedRows,
        weight: Float[Array, "..."] | Fp8Weight,
        shape: ParameterShape,
        *,
        batch_axes: int,
        in_axes: int,
        gather_dtype: jnp.dtype,
    ) -> Float[Array, "..."]:
        """Returns product(x, weight), computed by every rank for its own tokens."""
        if isinstance(weight, Fp8Weight) and weight.gradient is None:
            if gather_dtype == weight.dtype:  # an FP8 recipe gathers weights as they are stored
                gather_dtype = jnp.dtype(jnp.float32)
            weight = weight.astype(gather_dtype)
        return multiply_on_ranks(
            self.mesh, product, x, weight, shape, batch_axes=batch_axes, in_axes=in_axes, gather_dtype=gather_dtype
        )

    def run_on_tokens(
        self, function: Callable[..., Any], tokens: tuple[Array, ...], whole: tuple[Array, ...]
    ) -> tuple[Any, Any]:
        """Returns function(*tokens, *whole), computed by every rank for its own tokens."""
        axes = token_axes(self.mesh, tokens[0].shape[:2])
        by_token, by_rank = PartitionSpec(*axes), PartitionSpec((*BATCH_AXES, *[CONTEXT] * (CONTEXT in axes)))
        in_specs = (*[by_token] * len(tokens), *[PartitionSpec()] * len(whole))
        return on_every_rank(self.mesh, function, in_specs=in_specs, out_specs=(by_token, by_rank))(*tokens, *whole)

    def look_up(
        self, table: Float[Array, "V d"], tokens: Int[Array, "B T"], shape: ParameterShape, dtype: jnp.dtype
    ) -> Float[Array, "B T d"]:
        """Returns the table's rows of the tokens, in `dtype`."""
        return look_up_on_ranks(self.mesh, table, tokens, shape, dtype)

    def attend(
        self,
        attention: CoreAttention,
        queries: Float[Array, "B T H qk"],
        keys: Float[Array, "B T H c"],
        values: Float[Array, "B T H v"],
        shared_keys: Float[Array, "B T r"],
        segment_ids: Int[Array, "B T"] | None,
    ) -> Float[Array, "B T H v"] | AttendedRows:
        """Returns attention(...). A kernel is run by every rank, for its own sequences and heads.

        So is any attention where there is a context axis.
        """
        if self.context_ranks == 1 and not pallas_kernels.has_attention_kernel(queries, keys, values):
            return attention(queries, keys, values, shared_keys, segment_ids)
        return attend_on_ranks(self.mesh, attention, queries, keys, values, shared_keys, segment_ids)

    def attend_to_pages(
        self,
        attention: Callable[..., Array],
        queries: Float[Array, "B T H c"],
        rope_queries: Float[Array, "B T H r"],
        latents: Float[Array, "P page c"],
        rope_keys: Float[Array, "P page r"],
        table: Int[Array, "B N"],
        positions: Int[Array, "B T"],
    ) -> Float[Array, "B T H c"]:
        """Returns attention(...), which every rank runs for its own sequences and heads."""
        return attend_to_pages_on_ranks(
            self.mesh, attention, queries, rope_queries, latents, rope_keys, table, positions
        )

    def gate(
        self,
        logits: Float[Array, "B T E"],
        bias: Float[Array, " E"] | None,
        token_mask: Bool[Array, "B T"] | None,
        **settings: Any,
    ) -> pallas_kernels.Gates:
        """Returns experts, gates and statistics of every token; the load is the whole batch's."""
        return gate_on_ranks(self.mesh, logits, bias, token_mask, **settings)

    def apply_experts(
        self,
        u: Float[Array, "*batch d"],
        gates: pallas_kernels.Gates,
        gate_up: Float[Array, "E 2 I d"] | Fp8Weight,
        down: Float[Array, "E d I"] | Fp8Weight,
        networks: ExpertNetworks,
        shapes: ExpertShapes,
    ) -> Float[Array, "*batch d"]:
        """Returns sum_i g_i E_i(u): tokens are dispatched to the ranks of their experts, and results combined."""
        constants = [isinstance(w, Fp8Weight) and w.gradient is None for w in (gate_up, down)]
        gate_up, down = (
            w.astype(jnp.float32) if constant else w for w, constant in zip((gate_up, down), constants, strict=True)
        )
        return ExpertExchange(self.mesh, shapes, self.overlap)(u, gates, gate_up, down, networks)

    def sum_over_batch(self, x: Array) -> Array:
        """Returns the sum over the whole batch, from a sum over the sequences that this program sees."""
        return sum_over_batch(x)

    @property
    def batch_ranks(self) -> int:
        """The number of ranks over which the sequences of a batch are sharded."""
        return math.prod(self.mesh.shape[axis] for axis in BATCH_AXES)

    @property
    def context_ranks(self) -> int:
        """The size of the context axis."""
        return self.mesh.shape[CONTEXT]

    @property
    def expert_ranks(self) -> int:
        """The size of the expert axis."""
        return self.mesh.shape["expert"]

    def replicated(self, tree: Tree) -> Tree:
        """Returns the arrays of `tree` with a copy of each on every device of the mesh."""
        whole = NamedSharding(self.mesh, PartitionSpec())
        return jax.tree.map(lambda x: lax.with_sharding_constraint(x, whole), tree)

    def shardings(self, tree: Tree) -> Tree:
        """Returns the NamedSharding with which each array of `tree` (parameters, or their shapes) is kept."""
        return shardings(tree, self.mesh, rules_over_stages(self.layers))
