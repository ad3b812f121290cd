"""The gate on a mesh: every rank chooses experts for its own tokens; loads are summed over all ranks.

Where the tokens of a sequence are on several ranks, f_i and P_i (report Eq. 18 and 20), which are means over a
sequence, are averaged over these ranks by their numbers of real tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float

import pallas_kernels
from dsv3_jax.sharding.ranks import on_every_rank
from dsv3_jax.sharding.rules import BATCH_AXES, CONTEXT, token_axes


def gate_on_ranks(
    mesh: Mesh,
    logits: Float[Array, "B T E"],
    bias: Float[Array, " E"] | None,
    token_mask: Bool[Array, "B T"] | None,
    **settings: Any,
) -> pallas_kernels.Gates:
    """Returns `pallas_kernels.gate(logits, bias, token_mask=token_mask, **settings)` with the whole batch's load."""
    axes = token_axes(mesh, logits.shape[:2])
    tokens, sequences, whole = PartitionSpec(*axes), PartitionSpec(BATCH_AXES), PartitionSpec()

    def on_a_rank(logits: Array, bias: Array | None, token_mask: Array | None) -> pallas_kernels.Gates:
        gates = pallas_kernels.gate(logits, bias, token_mask=token_mask, **settings)
        if CONTEXT not in axes:
            return dataclasses.replace(gates, load=lax.psum(gates.load, BATCH_AXES))
        mask = jnp.ones(logits.shape[:2], bool) if token_mask is None else token_mask
        counts = jnp.sum(mask, axis=1, keepdims=True).astype(gates.affinity_mean.dtype)
        share = counts / jnp.maximum(lax.psum(counts, CONTEXT), 1)
        return dataclasses.replace(
            gates,
            load=lax.psum(gates.load, (*BATCH_AXES, CONTEXT)),
            affinity_mean=lax.psum(share * gates.affinity_mean, CONTEXT),
            selection_fraction=lax.psum(share * gates.selection_fraction, CONTEXT),
        )

    return on_every_rank(
        mesh,
        on_a_rank,
        in_specs=(tokens, whole, tokens),
        out_specs=pallas_kernels.Gates(
            expert_index=tokens,  # pyright: ignore[reportArgumentType]
            gate=tokens,  # pyright: ignore[reportArgumentType]
            load=whole,  # pyright: ignore[reportArgumentType]
            affinity_mean=sequences,  # pyright: ignore[reportArgumentType]
            selection_fraction=sequences,  # pyright: ignore[reportArgumentType]
        ),
    )(logits, bias, token_mask)
