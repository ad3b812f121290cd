"""The gate on TPUs, in Mosaic TPU: one pass from logits to experts, gates and statistics.

Tokens are along the lanes and experts along the sublanes, so that a maximum over the experts is elementwise work of the
vector unit and a group of a multiple of 8 experts is a block of whole registers. Each of the K choices is the lowest
index among the largest candidates, which is then replaced by minus infinity. The counts and sums of a sequence stay in
VMEM, one per lane, until all its tokens are done; XLA adds up the lanes.
"""

from __future__ import annotations

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from pallas_kernels.device import LANES, once_a_program
from pallas_kernels.routing.reference import GateOutputs, GateParameters, affinities, gates_of

_MOST_TOKENS = 512  # tokens in one grid step
_OUT_OF_REACH = float(np.finfo(np.float32).min)  # below every candidate, above the chosen ones' minus infinity


@once_a_program("parameters")
def gate(
    logits: Float[Array, "S T E"],
    bias: Float[Array, " E"] | None,
    mask: Bool[Array, "S T"] | None,
    parameters: GateParameters,
    *,
    interpret: pltpu.InterpretParams | None = None,
) -> GateOutputs:
    """Computes `reference.gate`; sequences are padded to multiples of 128 tokens, groups are multiples of 8 experts."""
    sequences, tokens, experts = logits.shape
    chosen = parameters.num_experts_per_tok
    step = min(_MOST_TOKENS, tokens + -tokens % LANES)
    excess = -tokens % step
    counted = jnp.ones((sequences, tokens), jnp.float32) if mask is None else mask.astype(jnp.float32)
    counted = jnp.pad(counted, ((0, 0), (0, excess)))[:, None]
    by_expert = jnp.pad(logits.swapaxes(1, 2), ((0, 0), (0, 0), (0, excess)))
    operands = [by_expert, counted]
    in_specs = [pl.BlockSpec((1, experts, step), _tile), pl.BlockSpec((1, 1, step), _tile)]
    if bias is not None:
        operands.append(bias.astype(jnp.float32)[:, None])
        in_specs.append(pl.BlockSpec((experts, 1), lambda s, t: (0, 0)))
    index, picked, sums = pl.pallas_call(
        functools.partial(_kernel, parameters=parameters),
        grid=(sequences, (tokens + excess) // step),
        in_specs=in_specs,
        out_specs=[
            pl.BlockSpec((1, chosen, step), _tile),
            pl.BlockSpec((1, chosen, step), _tile),
            pl.BlockSpec((1, 3, experts, LANES), lambda s, t: (s, 0, 0, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((sequences, chosen, tokens + excess), jnp.int32),
            jax.ShapeDtypeStruct((sequences, chosen, tokens + excess), jnp.float32),
            jax.ShapeDtypeStruct((sequences, 3, experts, LANES), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret or False,
        name="gate",
    )(*operands)

    def by_token(x: Array) -> Array:
        return x.swapaxes(1, 2)[:, :tokens]

    counts, unrestricted, shares = jnp.moveaxis(jnp.sum(sums, axis=-1), 1, 0)
    weights = gates_of(by_token(picked), parameters)
    return GateOutputs(by_token(index), weights, counts.astype(jnp.int32), unrestricted.astype(jnp.int32), shares)


def _tile(sequence, tokens):
    return sequence, 0, tokens


def _kernel(logits_ref, counted_ref, *refs, parameters: GateParameters):
    *bias_ref, index_ref, picked_ref, sums_ref = refs
    scores = _affinities(logits_ref[0], parameters.scoring_func)
    counted = counted_ref[0]
    number = lax.broadcasted_iota(jnp.int32, scores.shape, 0).astype(jnp.float32)
    total = jnp.sum(scores, axis=0, keepdims=True)
    # A comparison ignores a NaN. The sum of the affinities does not, and 0 * NaN brings it into the gates.
    nothing = 0.0 * total

    def best(candidates):
        return _first_of_largest(candidates, number, axis=0)

    def without(candidates, expert):
        return jnp.where(number == expert, -jnp.inf, candidates)

    biased = scores + bias_ref[0][...] if bias_ref else scores
    restricted = _within_best_groups(jnp.maximum(biased, _OUT_OF_REACH), number, parameters)
    for k in range(parameters.num_experts_per_tok):
        expert = best(restricted)
        index_ref[0, pl.ds(k, 1)] = expert.astype(jnp.int32)
        picked_ref[0, pl.ds(k, 1)] = nothing + jnp.sum(jnp.where(number == expert, scores, 0.0), axis=0, keepdims=True)
        restricted = without(restricted, expert)
    unrestricted = restricted
    if bias_ref or parameters.n_group > 1:
        unrestricted = scores
        for _k in range(parameters.num_experts_per_tok):
            unrestricted = without(unrestricted, best(unrestricted))

    @pl.when(pl.program_id(1) == 0)
    def _():
        sums_ref[...] = jnp.zeros_like(sums_ref)

    sums_ref[0, 0] += _sums_per_lane(jnp.where(restricted == -jnp.inf, counted, 0.0))
    sums_ref[0, 1] += _sums_per_lane(jnp.where(unrestricted == -jnp.inf, counted, 0.0))
    sums_ref[0, 2] += _sums_per_lane(scores * (counted / total))


def _affinities(logits: Float[Array, "E T"], scoring_func: str) -> Float[Array, "E T"]:
    return affinities(logits, "sigmoid") if scoring_func == "sigmoid" else jax.nn.softmax(logits, axis=0)


def _first_of_largest(x: Array, number: Array, axis: int) -> Array:
    """Returns the least `number` of the largest elements along `axis`; the largest number if all elements are NaN."""
    reached = x == jnp.max(x, axis=axis, keepdims=True)
    return jnp.min(jnp.where(reached, number, jnp.max(number, axis=axis, keepdims=True)), axis=axis, keepdims=True)


def _within_best_groups(
    candidates: Float[Array, "E T"], number: Float[Array, "E T"], parameters: GateParameters
) -> Float[Array, "E T"]:
    """Returns the candidates of each token's best groups; those of others get a value below all."""
    if parameters.n_group == 1:
        return candidates
    grouped = candidates.reshape(parameters.n_group, -1, candidates.shape[1])
    score = jnp.max(grouped, axis=1, keepdims=True)
    if parameters.group_score == "top2_sum":
        numbers = number.reshape(grouped.shape)
        first = _first_of_largest(grouped, numbers, axis=1)
        score += jnp.max(jnp.where(numbers == first, -jnp.inf, grouped), axis=1, keepdims=True)
    groups = range(parameters.n_group)
    allowed = []
    for g in groups:
        ahead = [score[q] >= score[g] if q < g else score[q] > score[g] for q in groups if q != g]
        in_reach = sum(jnp.where(a, 1.0, 0.0) for a in ahead) < parameters.topk_group
        allowed.append(jnp.where(in_reach, grouped[g], _OUT_OF_REACH))
    return jnp.concatenate(allowed, axis=0)


def _sums_per_lane(x: Float[Array, "E T"]) -> Float[Array, "E 128"]:
    """Returns the sums over the tokens of each lane."""
    parts = [x[:, start : start + LANES] for start in range(0, x.shape[1], LANES)]
    return functools.reduce(jnp.add, parts)
