"""The backward pass of training attention on TPUs, in Mosaic TPU: one kernel for dQ, one for dK and dV.

As on Hopper (`hopper_backward`), both recompute the weights from the logarithms of the rows' sums, each adds up its own
gradients in VMEM, and the result is the same every time. The second computes transposed logits, so that the statistics
of the queries are along the lanes, as they are in memory. It visits all heads of a tile of keys in turn, with one sum
for the keys that they share.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.device import LANES, once_a_program
from pallas_kernels.latent_attention.operands import OfResult, Operands
from pallas_kernels.latent_attention.tiles import key_tiles, query_tiles
from pallas_kernels.latent_attention.tpu_form import (
    VMEM_BYTES,
    Form,
    Interpret,
    by_head,
    by_position,
    ids_of,
    make_form,
    mask,
    masked_where_needed,
    padded,
    product,
)


@once_a_program("scale", "causal")
def backward(
    x: Operands, result: OfResult, scale: float, causal: bool, *, interpret: Interpret = None
) -> tuple[Array, Array, Array, Array | None]:
    """Returns the gradients of q, k, v and k_shared."""
    q, k, v, k_shared, segment_ids = x
    batch, length = q.shape[:2]
    form = make_form(length, scale, causal)
    operands = [by_head(array, form) for array in (q, k, v, result.gradient.astype(q.dtype))]
    operands += [padded(statistic, form.tile, 2)[:, :, None] for statistic in (result.log_sums, result.mean)]
    if k_shared is not None:
        operands.append(padded(k_shared, form.tile, 1))
    ids = ids_of(segment_ids, form)
    tables = key_tiles(segment_ids, batch, length, form.tile, form.tile, causal)
    (dq,) = _launch("queries", tables, operands, ids, form, k_shared is not None, interpret)
    tables = query_tiles(segment_ids, batch, length, form.tile, form.tile, causal)
    dk, dv, *to_shared = _launch("keys", tables, operands, ids, form, k_shared is not None, interpret)
    gradients = [by_position(x, form) for x in (dq, dk, dv)]
    return (*gradients, to_shared[0][:, :length] if to_shared else None)  # pyright: ignore[reportReturnType]


def _launch(side: str, tables, operands, ids, form: Form, shared: bool, interpret: Interpret) -> list[Array]:
    """Runs one kernel. Its grid: batch, heads and tiles of own rows in either order, tiles of the other side."""
    q, k, v = operands[:3]
    batch, heads = q.shape[:2]
    keys = side == "keys"

    def at(axes, other: bool):
        """Returns batch, head and the tile of own rows or of the other side. Own keys are outside the loop of heads."""
        b, x, y, j, first, end = axes
        h, i = (y, x) if keys else (x, y)
        return b, h, jnp.minimum(first[b, i] + j, end[b, i] - 1) if other else i

    def rows(of_keys: bool, width: int) -> Any:
        def index(*axes):
            return *at(axes, of_keys != keys), 0

        return pl.BlockSpec((None, None, form.tile, width), index)

    def statistic(*axes):
        b, h, tile = at(axes, keys)
        return b, h, 0, tile

    def of_shared(*axes):
        b, _, tile = at(axes, not keys)
        return b, tile, 0

    in_specs = [rows(False, q.shape[-1]), rows(True, k.shape[-1]), rows(True, v.shape[-1]), rows(False, v.shape[-1])]
    in_specs += [pl.BlockSpec((None, None, 1, form.tile), statistic)] * 2
    if shared:
        in_specs.append(pl.BlockSpec((None, form.tile, q.shape[-1] - k.shape[-1]), of_shared))
    if ids:
        in_specs += [
            pl.BlockSpec((1, 1, form.tile), lambda *axes: (axes[0], 0, at(axes, True)[2])),
            pl.BlockSpec((1, form.tile, LANES), lambda *axes: (axes[0], at(axes, False)[2], 0)),
        ]
    outputs = [k, v] if keys else [q]
    out_specs = [rows(keys, x.shape[-1]) for x in outputs]
    out_shape = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs]
    if keys and shared:
        out_specs.append(in_specs[6])
        out_shape.append(jax.ShapeDtypeStruct(operands[6].shape, k.dtype))
    scratch = [pltpu.VMEM((form.tile, shape.shape[-1]), jnp.float32) for shape in out_shape]
    if not keys:
        scratch += [pltpu.VMEM((form.tile, LANES), jnp.float32)] * 2
    return pl.pallas_call(
        functools.partial(_keys_kernel if keys else _queries_kernel, form=form, own=k.shape[-1], shared=shared),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, form.tiles, heads, form.tiles) if keys else (batch, heads, form.tiles, form.tiles),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=interpret or False,
        name=f"latent_attention_backward_{side}",
    )(*tables, *operands, *ids)


def _queries_kernel(first, end, q, k, v, gradient, log_sums, mean, *refs, form: Form, own: int, shared: bool):
    *ids, dq, to_q, log_sums_column, mean_column = refs
    k_shared = ids.pop(0) if shared else None
    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    count = end[b, i] - first[b, i]

    @pl.when(j == 0)
    def _():
        to_q[...] = jnp.zeros_like(to_q)
        for column, row in ((log_sums_column, log_sums), (mean_column, mean)):
            column[...] = jnp.broadcast_to(row[...], (LANES, form.tile)).T

    def accumulate(masked: bool):
        logits = product(q[:, :own], k[...], (1, 1))
        if k_shared is not None:
            logits += product(q[:, own:], k_shared[...], (1, 1))
        logits *= form.scale
        if masked:
            logits = mask(logits, form, i, first[b, i] + j, ids, keys_in_rows=False)
        weights = jnp.exp(logits - log_sums_column[:, :1])
        logits_bar = weights * (product(gradient[...], v[...], (1, 1)) - mean_column[:, :1])
        logits_bar = logits_bar.astype(q.dtype)
        to_q[:, :own] += product(logits_bar, k[...], (1, 0))
        if k_shared is not None:
            to_q[:, own:] += product(logits_bar, k_shared[...], (1, 0))

    @pl.when(j < count)
    def _():
        masked_where_needed(form, i, first[b, i] + j, ids, accumulate)

    @pl.when(j == count - 1)
    def _():
        dq[...] = (to_q[...] * form.scale).astype(dq.dtype)


def _keys_kernel(first, end, q, k, v, gradient, log_sums, mean, *refs, form: Form, own: int, shared: bool):
    everything: list[Any] = list(refs) if shared else [*refs[:-2], None, *refs[-2:], None]
    *inputs, dk, dv, d_shared, to_k, to_v, to_shared = everything
    k_shared, ids = (inputs[0], inputs[1:]) if shared else (None, inputs)
    b, i, h, j = (pl.program_id(axis) for axis in range(4))
    count = end[b, i] - first[b, i]

    @pl.when(j == 0)
    def _():
        to_k[...] = jnp.zeros_like(to_k)
        to_v[...] = jnp.zeros_like(to_v)

    if shared:

        @pl.when((j == 0) & (h == 0))
        def _():
            to_shared[...] = jnp.zeros_like(to_shared)

    def accumulate(masked: bool):
        logits = product(k[...], q[:, :own], (1, 1))
        if k_shared is not None:
            logits += product(k_shared[...], q[:, own:], (1, 1))
        logits *= form.scale
        if masked:
            logits = mask(logits, form, i, first[b, i] + j, ids, keys_in_rows=True)
        weights = jnp.exp(logits - log_sums[...])
        to_v[...] += product(weights.astype(v.dtype), gradient[...], (1, 0))
        logits_bar = weights * (product(v[...], gradient[...], (1, 1)) - mean[...])
        logits_bar = logits_bar.astype(q.dtype)
        to_k[...] += product(logits_bar, q[:, :own], (1, 0))
        if shared:
            to_shared[...] += product(logits_bar, q[:, own:], (1, 0))

    @pl.when(j < count)
    def _():
        masked_where_needed(form, i, first[b, i] + j, ids, accumulate)

    @pl.when(j == count - 1)
    def _():
        dk[...] = (to_k[...] * form.scale).astype(dk.dtype)
        dv[...] = to_v[...].astype(dv.dtype)

    if d_shared is not None:

        @pl.when((j == count - 1) & (h == pl.num_programs(2) - 1))
        def _():
            d_shared[...] = (to_shared[...] * form.scale).astype(d_shared.dtype)
