"""The gate on Hopper, in Mosaic GPU: one pass from logits to experts, gates and statistics.

A warpgroup has 16 tokens, a warp four of them, and eight lanes share a token: its candidates are in the registers of
eight neighbours (32 each with 256 experts), so that a maximum over the experts costs three shuffles. Each of the K
choices is the lowest index among the largest candidates, which is then replaced by minus infinity; nothing is sorted.
Several such blocks share a multiprocessor and hide each other's shuffles and copies. The counts and sums over the
tokens of a tile are written once per tile. XLA adds the tiles up, in a fixed order, and normalizes the K gates, which
it has to transpose from [K, tokens] anyway.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from pallas_kernels.device import once_a_program
from pallas_kernels.hopper_launch import multiprocessors
from pallas_kernels.routing.reference import GateOutputs, GateParameters, gates_of

TILE = 16  # tokens of a block's tile
_LANES = 8  # lanes that share a token
_BLOCKS = 3  # blocks per multiprocessor: as many as its registers allow with 256 experts
_OUT_OF_REACH = float(np.finfo(np.float32).min)  # below every candidate, above the chosen ones' minus infinity

Interpret = plgpu.InterpretGPUParams | None


@once_a_program("parameters")
def gate(
    logits: Float[Array, "S T E"],
    bias: Float[Array, " E"] | None,
    mask: Bool[Array, "S T"] | None,
    parameters: GateParameters,
    *,
    interpret: Interpret = None,
) -> GateOutputs:
    """Computes `reference.gate`; sequences are padded to multiples of 16 tokens, groups are multiples of 8 experts."""
    sequences, tokens, experts = logits.shape
    chosen = parameters.num_experts_per_tok
    counted = jnp.ones((sequences, tokens), jnp.float32) if mask is None else mask.astype(jnp.float32)
    excess = -tokens % TILE
    if excess:
        logits, counted = jnp.pad(logits, ((0, 0), (0, excess), (0, 0))), jnp.pad(counted, ((0, 0), (0, excess)))
    rows = sequences * (tokens + excess)
    tiles = rows // TILE
    width = _piece(experts, parameters.n_group)
    scratch: dict[str, Any] = {
        "affinity_smem": plgpu.SMEM((experts // width, TILE, width), jnp.float32),
        "index_smem": plgpu.SMEM((chosen, TILE), jnp.int32),
        "chosen_smem": plgpu.SMEM((chosen, TILE), jnp.float32),
        "sums_smem": plgpu.SMEM((3, experts), jnp.float32),
        "arrived": plgpu.Barrier(num_arrivals=experts // width),
    }
    kernel = plgpu.kernel(
        functools.partial(_kernel, parameters=parameters),
        out_type=[
            jax.ShapeDtypeStruct((chosen, rows), jnp.int32),
            jax.ShapeDtypeStruct((chosen, rows), jnp.float32),
            jax.ShapeDtypeStruct((tiles, 3, experts), jnp.float32),
        ],
        scratch_types=scratch,
        grid=(min(tiles, _BLOCKS * multiprocessors()),),
        grid_names=("blocks",),
        kernel_name="gate",
        interpret=interpret,
    )
    operands = [logits.reshape(rows, experts), counted.reshape(rows)]
    index, affinities, sums = kernel(*operands, *([] if bias is None else [bias.astype(jnp.float32)]))

    def by_token(x: Array) -> Array:
        return x.T.reshape(sequences, -1, chosen)[:, :tokens]

    counts, unbiased, shares = jnp.moveaxis(jnp.sum(sums.reshape(sequences, -1, 3, experts), axis=1), 1, 0)
    weights = gates_of(by_token(affinities), parameters)
    return GateOutputs(by_token(index), weights, counts.astype(jnp.int32), unbiased.astype(jnp.int32), shares)


def _piece(experts: int, n_group: int) -> int:
    """Returns how many experts are computed together: those of a group, or a part of the only group."""
    return experts // n_group if n_group > 1 else math.gcd(experts, 4 * _LANES)


def _layout(width: int) -> Any:
    """Returns the layout of 16 tokens by `width` experts: 4 tokens per warp, 8 lanes per token, 4 experts per lane."""
    vector = math.gcd(width // _LANES, 4)
    columns = _LANES * vector
    tiling = plgpu.Tiling(((TILE, columns), (TILE // 4, columns), (vector,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


def _kernel(
    logits, counted, *refs, parameters: GateParameters, affinity_smem, index_smem, chosen_smem, sums_smem, arrived
):  # fmt: skip
    *bias, index_out, chosen_out, sums_out = refs
    count, _, width = affinity_smem.shape
    pieces, experts, chosen = range(count), count * width, parameters.num_experts_per_tok
    layout = _layout(width)

    def numbers(piece: int):
        """Returns the expert of each column as float32, which is exact, in the layout of the candidates."""
        column = plgpu.broadcasted_iota(jnp.int32, (TILE, width), 1, layout=layout)
        return (column + piece * width).astype(jnp.float32)

    def affinities():
        return [plgpu.load(affinity_smem.at[p], layout=layout) for p in pieces]

    def best(candidates):
        """Returns the lowest expert that has each token's largest candidate, and its affinity."""
        largest, expert, affinity = candidates[0], numbers(0), affinities()[0]
        for p in pieces[1:]:
            better = candidates[p] > largest
            largest = jnp.where(better, candidates[p], largest)
            expert = jnp.where(better, numbers(p), expert)
            affinity = jnp.where(better, affinities()[p], affinity)
        reached = largest == _across(jnp.max(largest, axis=1), largest)
        first = jnp.min(jnp.where(reached, expert, float(experts - 1)), axis=1)
        return first, jnp.sum(jnp.where(expert == _across(first, expert), affinity, 0.0), axis=1)

    def without(candidates, expert):
        return tuple(
            jnp.where(numbers(p) == _across(expert, c), -jnp.inf, c) for p, c in zip(pieces, candidates, strict=True)
        )

    def group_score(piece: int, candidates):
        largest = jnp.max(candidates, axis=1)
        if parameters.group_score == "max":
            return largest
        reached = candidates == _across(largest, candidates)
        first = jnp.min(jnp.where(reached, numbers(piece), float(experts)), axis=1)
        others = jnp.where(numbers(piece) == _across(first, candidates), -jnp.inf, candidates)
        return largest + jnp.max(others, axis=1)

    def within_best_groups(candidates):
        """Returns the candidates of each token's best groups; those of others get a value below all."""
        if parameters.n_group == 1:
            return candidates
        scores = [group_score(p, c) for p, c in zip(pieces, candidates, strict=True)]
        allowed = []
        for p, c in zip(pieces, candidates, strict=True):
            ahead = [
                jnp.where((scores[q] >= scores[p]) if q < p else (scores[q] > scores[p]), 1.0, 0.0)
                for q in pieces
                if q != p
            ]
            in_reach = _across(functools.reduce(jnp.add, ahead), c) < float(parameters.topk_group)
            allowed.append(jnp.where(in_reach, c, _OUT_OF_REACH))
        return tuple(allowed)

    def choose(candidates, nothing):
        """Writes each token's experts and affinities to shared memory, best first; returns the other candidates."""

        def one(k, candidates):
            expert, affinity = best(candidates)
            index_smem[k] = expert.astype(jnp.int32)
            chosen_smem[k] = affinity + nothing
            return without(candidates, expert)

        return lax.fori_loop(0, chosen, one, candidates)

    @plgpu.nd_loop((sums_out.shape[0],), collective_axes="blocks")
    def _(loop):
        (tile,) = loop.index
        tokens = pl.ds(tile * TILE, TILE)
        for p in pieces:
            plgpu.copy_gmem_to_smem(logits.at[tokens, pl.ds(p * width, width)], affinity_smem.at[p], arrived)
        plgpu.barrier_wait(arrived)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        _score_in_place(affinity_smem, pieces, layout, parameters.scoring_func)

        candidates = tuple(affinities())
        if bias:
            biases = [
                plgpu.load(bias[0].at[pl.ds(p * width, width)], layout=layout.reduce(0), optimized=False)
                for p in pieces
            ]
            candidates = tuple(s + _down(b, s) for s, b in zip(candidates, biases, strict=True))
        candidates = tuple(jnp.maximum(c, _OUT_OF_REACH) for c in candidates)
        # A comparison ignores a NaN. The sum of the affinities does not, and 0 * NaN brings it into the gates.
        total = functools.reduce(jnp.add, [jnp.sum(s, axis=1) for s in affinities()])
        restricted = choose(within_best_groups(candidates), 0.0 * total)
        unrestricted = restricted
        if bias or parameters.n_group > 1:
            unrestricted = lax.fori_loop(0, chosen, lambda _, c: without(c, best(c)[0]), tuple(affinities()))

        counts = plgpu.load(counted.at[tokens], layout=layout.reduce(1), optimized=False)
        for p, affinity in zip(pieces, affinities(), strict=True):
            columns = pl.ds(p * width, width)
            weight = _across(counts, affinity)
            sums_smem[0, columns] = jnp.sum(jnp.where(restricted[p] == -jnp.inf, weight, 0.0), axis=0)
            sums_smem[1, columns] = jnp.sum(jnp.where(unrestricted[p] == -jnp.inf, weight, 0.0), axis=0)
            sums_smem[2, columns] = jnp.sum(affinity * _across(counts / total, affinity), axis=0)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(index_smem, index_out.at[:, tokens])
        plgpu.copy_smem_to_gmem(chosen_smem, chosen_out.at[:, tokens])
        plgpu.copy_smem_to_gmem(sums_smem, sums_out.at[tile])

    plgpu.wait_smem_to_gmem(0)


def _score_in_place(affinity_smem, pieces, layout, scoring_func: str) -> None:
    """Replaces the logits in shared memory by affinities."""
    logits = [plgpu.load(affinity_smem.at[p], layout=layout) for p in pieces]
    if scoring_func == "sigmoid":
        scores = [1.0 / (1.0 + jnp.exp(-x)) for x in logits]
    else:
        largest = functools.reduce(jnp.maximum, [jnp.max(x, axis=1) for x in logits])
        powers = [jnp.exp(x - _across(largest, x)) for x in logits]
        total = functools.reduce(jnp.add, [jnp.sum(power, axis=1) for power in powers])
        scores = [power / _across(total, power) for power in powers]
    for p, score in zip(pieces, scores, strict=True):
        affinity_smem[p] = score
    plgpu.commit_smem()


def _across(rows: Float[Array, " 16"], like: Array) -> Float[Array, "16 width"]:
    return lax.broadcast_in_dim(rows, like.shape, (0,))


def _down(columns: Float[Array, " width"], like: Array) -> Float[Array, "16 width"]:
    return lax.broadcast_in_dim(columns, like.shape, (1,))
