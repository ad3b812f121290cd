"""The gate on Hopper, in Mosaic GPU: one pass from logits to experts, gates and statistics.

A warpgroup takes 64 tokens: two rows of registers a thread, so that each token's maxima and sums are over four
neighbouring threads. The affinities rest in shared memory, the candidates in registers; each of the K choices is a
maximum, the lowest index that reaches it, and a blank in its place. Nothing is sorted. The counts and sums over a
tile's tokens are written a tile; adding the tiles up is left to XLA, in a fixed order.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from pallas_kernels.hopper_launch import multiprocessors
from pallas_kernels.routing.reference import EPSILON, GateOutputs, GateParameters

TILE = 64  # tokens
_LAYOUT = plgpu.Layout.WGMMA
_ROWS, _COLUMNS = _LAYOUT.reduce(1), _LAYOUT.reduce(0)

Interpret = plgpu.InterpretGPUParams | None


def gate(
    logits: Float[Array, "S T E"],
    bias: Float[Array, " E"] | None,
    mask: Bool[Array, "S T"] | None,
    parameters: GateParameters,
    *,
    interpret: Interpret = None,
) -> GateOutputs:
    """As `reference.gate`. Sequences are padded to a multiple of 64 tokens."""
    sequences, tokens, experts = logits.shape
    chosen = parameters.num_experts_per_tok
    counted = jnp.ones((sequences, tokens), jnp.float32) if mask is None else mask.astype(jnp.float32)
    excess = -tokens % TILE
    if excess:
        logits, counted = jnp.pad(logits, ((0, 0), (0, excess), (0, 0))), jnp.pad(counted, ((0, 0), (0, excess)))
    rows = sequences * (tokens + excess)
    tiles = rows // TILE
    biased = bias is not None
    width = _piece(experts, parameters.n_group)
    scratch: dict[str, Any] = {
        "logits_smem": plgpu.SMEM((experts // width, TILE, width), jnp.float32),
        "index_smem": plgpu.SMEM((chosen, TILE), jnp.int32),
        "gate_smem": plgpu.SMEM((chosen, TILE), jnp.float32),
        "sums_smem": plgpu.SMEM((3, experts), jnp.float32),
        "arrived": plgpu.Barrier(num_arrivals=experts // width),
    }
    kernel = plgpu.kernel(
        functools.partial(_kernel, parameters=parameters, biased=biased, width=width, experts=experts),
        out_type=[
            jax.ShapeDtypeStruct((chosen, rows), jnp.int32),
            jax.ShapeDtypeStruct((chosen, rows), jnp.float32),
            jax.ShapeDtypeStruct((tiles, 3, experts), jnp.float32),
        ],
        scratch_types=scratch,
        grid=(min(tiles, 2 * multiprocessors()),),
        grid_names=("blocks",),
        kernel_name="gate",
        interpret=interpret,
    )
    operands = [logits.reshape(rows, experts), counted.reshape(rows)] + ([bias.astype(jnp.float32)] if biased else [])
    index, weights, sums = kernel(*operands)

    def by_token(x: Array) -> Array:
        return x.T.reshape(sequences, -1, chosen)[:, :tokens]

    counts, unbiased, shares = jnp.moveaxis(jnp.sum(sums.reshape(sequences, -1, 3, experts), axis=1), 1, 0)
    return GateOutputs(by_token(index), by_token(weights), counts.astype(jnp.int32), unbiased.astype(jnp.int32), shares)


def _piece(experts: int, n_group: int) -> int:
    """Columns worked on together: a group, or a part of the only group."""
    return experts // n_group if n_group > 1 else math.gcd(experts, 64)


def _kernel(
    logits, counted, *refs, parameters: GateParameters, biased: bool, width: int, experts: int,
    logits_smem, index_smem, gate_smem, sums_smem, arrived,
):  # fmt: skip
    bias = refs[0] if biased else None
    index_out, gate_out, sums_out = refs[-3:]
    pieces = range(experts // width)
    chosen = parameters.num_experts_per_tok

    def numbers(piece: int):
        """Index of each column's expert, as float32: exact, and of the layout and type of what it is chosen by."""
        column = plgpu.broadcasted_iota(jnp.int32, (TILE, width), 1, layout=_LAYOUT)
        return (column + piece * width).astype(jnp.float32)

    def affinities(piece: int):
        return plgpu.load(logits_smem.at[piece], layout=_LAYOUT)

    def best(candidates):
        """The largest value of each token and the lowest expert that has it."""
        largest = functools.reduce(jnp.maximum, [jnp.max(c, axis=1) for c in candidates])
        first = [
            jnp.max(jnp.where(c == _across(largest, c), float(experts) - numbers(p), -1.0), axis=1)
            for p, c in zip(pieces, candidates, strict=True)
        ]
        return largest, float(experts) - functools.reduce(jnp.maximum, first)

    def choose(candidates):
        """The top K experts of each token, best first."""
        order = []
        for _ in range(chosen):
            _, expert = best(candidates)
            order.append(expert)
            candidates = [
                jnp.where(numbers(p) == _across(expert, c), -jnp.inf, c)
                for p, c in zip(pieces, candidates, strict=True)
            ]
        return order

    def within_best_groups(candidates):
        """Minus infinity where a token's group is not among its best."""
        if parameters.n_group == 1:
            return candidates
        scores = []
        for p, c in zip(pieces, candidates, strict=True):
            largest = jnp.max(c, axis=1)
            if parameters.group_score == "top2_sum" and width > 1:
                first = float(experts) - jnp.max(
                    jnp.where(c == _across(largest, c), float(experts) - numbers(p), -1.0), axis=1
                )
                second = jnp.max(jnp.where(numbers(p) == _across(first, c), -jnp.inf, c), axis=1)
                largest = largest + second
            scores.append(largest)
        allowed = []
        for p, c in zip(pieces, candidates, strict=True):
            ahead = [
                jnp.where((scores[q] >= scores[p]) if q < p else (scores[q] > scores[p]), 1.0, 0.0)
                for q in pieces
                if q != p
            ]
            kept = functools.reduce(jnp.add, ahead) < float(parameters.topk_group)
            allowed.append(jnp.where(_across(jnp.where(kept, 1.0, 0.0), c) > 0.5, c, -jnp.inf))
        return allowed

    @plgpu.nd_loop((index_out.shape[1] // TILE,), collective_axes="blocks")
    def _(loop):
        (tile,) = loop.index
        tokens = pl.ds(tile * TILE, TILE)
        for p in pieces:
            plgpu.copy_gmem_to_smem(logits.at[tokens, pl.ds(p * width, width)], logits_smem.at[p], arrived)
        plgpu.barrier_wait(arrived)
        _score_in_place(logits_smem, pieces, parameters.scoring_func)
        scores = [affinities(p) for p in pieces]
        total = functools.reduce(jnp.add, [jnp.sum(s, axis=1) for s in scores])

        candidates = scores
        if bias is not None:
            biases = [plgpu.load(bias.at[pl.ds(p * width, width)], layout=_COLUMNS, optimized=False) for p in pieces]
            candidates = [s + _down(b, s) for s, b in zip(scores, biases, strict=True)]
        order = choose(within_best_groups(candidates))

        weights = []
        for expert in order:
            hits = [jnp.where(numbers(p) == _across(expert, scores[0]), affinities(p), 0.0) for p in pieces]
            weights.append(functools.reduce(jnp.add, [jnp.sum(h, axis=1) for h in hits]))
        if parameters.norm_topk_prob:
            normaliser = functools.reduce(jnp.add, weights) + EPSILON
            weights = [w / normaliser for w in weights]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for k in range(chosen):
            index_smem[k] = order[k].astype(jnp.int32)
            gate_smem[k] = weights[k] * parameters.routed_scaling_factor

        counts = plgpu.load(counted.at[tokens], layout=_ROWS, optimized=False)
        unrestricted = order if bias is None and parameters.n_group == 1 else choose([affinities(p) for p in pieces])
        for p in pieces:
            columns = pl.ds(p * width, width)
            share = affinities(p)
            share = share * _across(counts / total, share)
            sums_smem[0, columns] = jnp.sum(_hits(order, numbers(p), counts), axis=0)
            sums_smem[1, columns] = jnp.sum(_hits(unrestricted, numbers(p), counts), axis=0)
            sums_smem[2, columns] = jnp.sum(share, axis=0)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(index_smem, index_out.at[:, tokens])
        plgpu.copy_smem_to_gmem(gate_smem, gate_out.at[:, tokens])
        plgpu.copy_smem_to_gmem(sums_smem, sums_out.at[tile])

    plgpu.wait_smem_to_gmem(0)


def _score_in_place(logits_smem, pieces, scoring_func: str) -> None:
    """Affinities where the logits were."""

    def load(p):
        return plgpu.load(logits_smem.at[p], layout=_LAYOUT)

    if scoring_func == "sigmoid":
        for p in pieces:
            logits_smem[p] = 1.0 / (1.0 + jnp.exp(-load(p)))
    else:
        largest = functools.reduce(jnp.maximum, [jnp.max(load(p), axis=1) for p in pieces])
        powers = [jnp.exp(load(p) - _across(largest, load(p))) for p in pieces]
        total = functools.reduce(jnp.add, [jnp.sum(power, axis=1) for power in powers])
        for p, power in zip(pieces, powers, strict=True):
            logits_smem[p] = power / _across(total, power)
    plgpu.commit_smem()


def _hits(order, numbers, counts):
    """How often each expert is among a token's chosen ones, for tokens that count."""
    total = jnp.zeros_like(numbers)
    for expert in order:
        total = total + jnp.where(numbers == _across(expert, numbers), 1.0, 0.0)
    return total * _across(counts, numbers)


def _across(rows: Float[Array, " 64"], like: Array) -> Float[Array, "64 width"]:
    return lax.broadcast_in_dim(rows, like.shape, (0,))


def _down(columns: Float[Array, " width"], like: Array) -> Float[Array, "64 width"]:
    return lax.broadcast_in_dim(columns, like.shape, (1,))
