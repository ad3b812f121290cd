"""The gate on a mesh: every rank chooses experts for its own sequences; loads are summed over all ranks."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float

import pallas_kernels
from dsv3_jax.sharding.ranks import on_every_rank
from dsv3_jax.sharding.rules import BATCH_AXES


def gate_on_ranks(
    mesh: Mesh,
    logits: Float[Array, "B T E"],
    bias: Float[Array, " E"] | None,
    token_mask: Bool[Array, "B T"] | None,
    **settings: Any,
) -> pallas_kernels.Gates:
    """Returns `pallas_kernels.gate(logits, bias, token_mask=token_mask, **settings)` with the whole batch's load."""
    batch, whole = PartitionSpec(BATCH_AXES), PartitionSpec()

    def on_a_rank(logits: Array, bias: Array | None, token_mask: Array | None) -> pallas_kernels.Gates:
        gates = pallas_kernels.gate(logits, bias, token_mask=token_mask, **settings)
        return dataclasses.replace(gates, load=lax.psum(gates.load, BATCH_AXES))

    return on_every_rank(
        mesh,
        on_a_rank,
        in_specs=(batch, whole, batch),
        out_specs=pallas_kernels.Gates(
            expert_index=batch,  # pyright: ignore[reportArgumentType]
            gate=batch,  # pyright: ignore[reportArgumentType]
            load=whole,  # pyright: ignore[reportArgumentType]
            affinity_mean=batch,  # pyright: ignore[reportArgumentType]
            selection_fraction=batch,  # pyright: ignore[reportArgumentType]
        ),
    )(logits, bias, token_mask)
