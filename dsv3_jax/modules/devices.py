"""The operations of a model that depend on its devices (`Devices`), and their plain form on one device.

A model is given a `Devices` object when it is made. `OneDevice` computes everything where it is called;
`dsv3_jax.sharding.on_mesh.OnMesh` computes the same on the sharded arrays of a mesh.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array, Bool, Float, Int

import pallas_kernels
from dsv3_jax.modules.attention_core import CoreAttention
from dsv3_jax.modules.expert_shares import LEAST_SHARE, apply_in_shares, share_of
from dsv3_jax.modules.parameter import ParameterShape
from dsv3_jax.precision import AttendedRows, ExpertNetworks, Fp8Recipe, PreparedRows
from pallas_kernels import TILE
from pallas_kernels.device import target_platform

Tree = Any
"""A pytree that contains nnx Variables."""


@dataclasses.dataclass(frozen=True)
class ExpertShapes:
    """The sizes of a layer's experts that the exchange of tokens between devices needs.

    Attributes:
      gate_up, down: shapes and logical axes of the weights.
      groups: contiguous groups of experts that node-limited routing chooses from (n_group).
      reached_groups: the most groups that one token's experts belong to (topk_group); None where experts are not
        placed in the order of the groups.
      fp8: the FP8 recipe whose field `dispatch` says whether tokens are sent in FP8; None without FP8.
      gather_dtype: dtype in which shards of the weights are all-gathered; None for their own.
    """

    gate_up: ParameterShape
    down: ParameterShape
    groups: int
    reached_groups: int | None
    fp8: Fp8Recipe | None
    gather_dtype: jnp.dtype | None


class Devices(Protocol):
    """The operations of a model that depend on where its arrays are."""

    def multiply(
        self,
        product: Callable[[Any, Array], Array],
        x: Float[Array, "..."] | PreparedRows,
        weight: Float[Array, "..."],
        shape: ParameterShape,
        *,
        batch_axes: int,
        in_axes: int,
        gather_dtype: jnp.dtype,
    ) -> Float[Array, "..."]:
        """Computes product(x, weight).

        Args:
          product: a linear map; it may be called with a shard of the tokens and of the weight's outputs or inputs.
          x: [*batch, ..., *in].
          weight: [*out, *in], of `shape`.
          batch_axes: number of batch dimensions of `x` and of the result; the first is the sequences.
          in_axes: number of input dimensions of the weight.
          gather_dtype: dtype in which shards of the weight are all-gathered; float8_e4m3fn with a scale for every
            block of 128 x 128.

        Returns:
          The products. Where the outputs are heads of attention, which need all tokens of a sequence, a device may
          compute some of the heads for all tokens.
        """
        ...

    def run_on_tokens(
        self, function: Callable[..., Any], tokens: tuple[Array, ...], whole: tuple[Array, ...]
    ) -> tuple[Any, Any]:
        """Returns function(*tokens, *whole): a tree of arrays by token, and one of partial sums. It has no gradient.

        It may be called with a shard of the tokens.

        Args:
          function: returns the two trees; partial sums have a first axis of size 1, along which calls are stacked.
          tokens: arrays [B, T, ...].
          whole: arrays that every call gets whole.
        """
        ...

    def look_up(
        self, table: Float[Array, "V d"], tokens: Int[Array, "B T"], shape: ParameterShape, dtype: jnp.dtype
    ) -> Float[Array, "B T d"]:
        """Returns the table's rows of the tokens, in `dtype`."""
        ...

    def attend(
        self,
        attention: CoreAttention,
        queries: Float[Array, "B T H qk"],
        keys: Float[Array, "B T H c"],
        values: Float[Array, "B T H v"],
        shared_keys: Float[Array, "B T r"],
        segment_ids: Int[Array, "B T"] | None,
    ) -> Float[Array, "B T H v"] | AttendedRows:
        """Returns attention(queries, keys, values, shared_keys, segment_ids).

        It may be called with a shard of the sequences and of the heads.
        """
        ...

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
        """Returns attention(queries, rope_queries, latents, rope_keys, table, positions), a kernel's.

        It may be called with a shard of the sequences and of the heads, and with all pages.
        """
        ...

    def gate(
        self,
        logits: Float[Array, "B T E"],
        bias: Float[Array, " E"] | None,
        token_mask: Bool[Array, "B T"] | None,
        **settings: Any,
    ) -> pallas_kernels.Gates:
        """Returns what `pallas_kernels.gate` returns for these arguments, with the whole batch's load."""
        ...

    def apply_experts(
        self,
        u: Float[Array, "*batch d"],
        gates: pallas_kernels.Gates,
        gate_up: Float[Array, "E 2 I d"],
        down: Float[Array, "E d I"],
        networks: ExpertNetworks,
        shapes: ExpertShapes,
    ) -> Float[Array, "*batch d"]:
        """Returns sum_i g_i E_i(u) of every token; `gates` has leading axes that flatten to the tokens of `u`."""
        ...

    def sum_over_batch(self, x: Array) -> Array:
        """Returns the sum over the whole batch, from a sum over the sequences that this program sees."""
        ...

    @property
    def batch_ranks(self) -> int:
        """The number of sequences of a batch is a multiple of this."""
        ...

    @property
    def context_ranks(self) -> int:
        """Number of devices over which the tokens of a sequence are divided."""
        ...

    @property
    def expert_ranks(self) -> int:
        """Number of devices over which the experts of a layer are divided."""
        ...

    def replicated(self, tree: Tree) -> Tree:
        """Returns the arrays of `tree` with a copy of each on every device."""
        ...

    def shardings(self, tree: Tree) -> Tree:
        """Returns the Sharding with which each array of `tree` (parameters, or their shapes) is kept."""
        ...


@dataclasses.dataclass(frozen=True)
class OneDevice:
    """One device, which holds every array whole."""

    def multiply(
        self,
        product: Callable[[Any, Array], Array],
        x: Float[Array, "..."] | PreparedRows,
        weight: Float[Array, "..."],
        shape: ParameterShape,
        *,
        batch_axes: int,
        in_axes: int,
        gather_dtype: jnp.dtype,
    ) -> Float[Array, "..."]:
        """Returns product(x, weight)."""
        return product(x, weight)

    def run_on_tokens(
        self, function: Callable[..., Any], tokens: tuple[Array, ...], whole: tuple[Array, ...]
    ) -> tuple[Any, Any]:
        """Returns function(*tokens, *whole)."""
        return function(*tokens, *whole)

    def look_up(
        self, table: Float[Array, "V d"], tokens: Int[Array, "B T"], shape: ParameterShape, dtype: jnp.dtype
    ) -> Float[Array, "B T d"]:
        """Returns the table's rows of the tokens, in `dtype`."""
        return table[tokens].astype(dtype)

    def attend(
        self,
        attention: CoreAttention,
        queries: Float[Array, "B T H qk"],
        keys: Float[Array, "B T H c"],
        values: Float[Array, "B T H v"],
        shared_keys: Float[Array, "B T r"],
        segment_ids: Int[Array, "B T"] | None,
    ) -> Float[Array, "B T H v"] | AttendedRows:
        """Returns attention(queries, keys, values, shared_keys, segment_ids)."""
        return attention(queries, keys, values, shared_keys, segment_ids)

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
        """Returns attention(queries, rope_queries, latents, rope_keys, table, positions)."""
        return attention(queries, rope_queries, latents, rope_keys, table, positions)

    def gate(
        self,
        logits: Float[Array, "B T E"],
        bias: Float[Array, " E"] | None,
        token_mask: Bool[Array, "B T"] | None,
        **settings: Any,
    ) -> pallas_kernels.Gates:
        """Returns experts, gates and statistics of every token."""
        return pallas_kernels.gate(logits, bias, token_mask=token_mask, **settings)

    def apply_experts(
        self,
        u: Float[Array, "*batch d"],
        gates: pallas_kernels.Gates,
        gate_up: Float[Array, "E 2 I d"],
        down: Float[Array, "E d I"],
        networks: ExpertNetworks,
        shapes: ExpertShapes,
    ) -> Float[Array, "*batch d"]:
        """Returns sum_i g_i E_i(u): tokens are sorted by expert, multiplied, and their results added up per token."""
        experts, chosen = gate_up.shape[0], gates.expert_index.shape[-1]
        expert_index, gate = (x.reshape(-1, chosen) for x in (gates.expert_index, gates.gate))
        batch, u = u.shape, u.reshape(-1, u.shape[-1])
        plain = shapes.fp8 is None and isinstance(gate_up, jax.Array)
        if plain and target_platform() == "cpu" and share_of(expert_index.size, experts) >= LEAST_SHARE:
            return apply_in_shares(u, gate, expert_index, gate_up, down, networks).reshape(batch)
        preferred = pallas_kernels.preferred_row_alignment(expert_index.size, experts)
        alignment = preferred if shapes.fp8 is None else TILE
        rows, permutation = pallas_kernels.permute(u, expert_index, experts, row_alignment=alignment)
        return networks.combined(rows, gate, (gate_up, down), permutation, alignment).reshape(batch)

    def sum_over_batch(self, x: Array) -> Array:
        """Returns `x`: the sequences at hand are the batch."""
        return x

    @property
    def batch_ranks(self) -> int:
        """One."""
        return 1

    @property
    def context_ranks(self) -> int:
        """One."""
        return 1

    @property
    def expert_ranks(self) -> int:
        """One."""
        return 1

    def replicated(self, tree: Tree) -> Tree:
        """Returns `tree`."""
        return tree

    def shardings(self, tree: Tree) -> Tree:
        """Returns the default device for every array."""
        sharding = SingleDeviceSharding(jax.local_devices()[0])
        return jax.tree.map(lambda _: sharding, tree)
