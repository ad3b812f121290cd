"""Absorbed decoding over pages on TPUs, in Mosaic TPU: a grid step has one page, which the table names ahead.

All query rows of a sequence stay in VMEM with their running maxima, sums and attended latents. Pages after a sequence's
last position are neither fetched nor multiplied.
"""

from __future__ import annotations

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.device import LANES, once_a_program
from pallas_kernels.latent_attention.tpu_form import HIDDEN, LOWEST, VMEM_BYTES, Interpret, padded, product
from pallas_kernels.latent_decode.operands import Operands

ROW_MULTIPLE = 16  # of query rows: the sublanes of a bfloat16 register


@once_a_program("scale", "first")
def decode(x: Operands, scale: float, first: int = 0, *, interpret: Interpret = None) -> Float[Array, "B T H c"]:
    """Computes `reference.decode`."""
    (batch, tokens, heads, width), rope = x.q_latent.shape, x.q_rope.shape[-1]
    page = x.latents.shape[1]
    queries = [padded(x.rows(q), ROW_MULTIPLE, 1) for q in (x.q_latent, x.q_rope)]
    rows = queries[0].shape[1]
    last = x.last_entries()
    last = jnp.pad(last, ((0, 0), (0, rows - last.shape[1])), constant_values=-1)
    count = (x.positions.max(axis=1).astype(jnp.int32) + page) // page
    table = jnp.minimum(x.table.astype(jnp.int32), x.latents.shape[0] - 1)

    def of_row(*sizes):
        return pl.BlockSpec((None, rows, *sizes), lambda b, n, count, table: (b, 0, 0))

    def of_page(*shape):
        # A page past the last one is not fetched.
        def index(b, n, count, table):
            return table[b, jnp.minimum(n, jnp.maximum(count[b] - 1, 0))], 0, 0

        return pl.BlockSpec((None, *shape), index)

    in_specs = [of_row(LANES), of_row(width), of_row(rope), of_page(page, width), of_page(page, rope)]
    operands = [jnp.broadcast_to(last[..., None], (batch, rows, LANES)), *queries, x.latents, x.rope_keys]
    if x.scales is not None:  # along the lanes, as the entries of the logits are
        in_specs.append(of_page(1, page))
        operands.append(x.scales[:, None])

    out = pl.pallas_call(
        functools.partial(_kernel, page=page, scale=scale, first=first),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, table.shape[1]),
            in_specs=in_specs,
            out_specs=of_row(width),
            scratch_shapes=[
                pltpu.VMEM((rows, LANES), jnp.float32),
                pltpu.VMEM((rows, LANES), jnp.float32),
                pltpu.VMEM((rows, width), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((batch, rows, width), x.q_latent.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=interpret or False,
        name="latent_decode",
    )(count, table, *operands)
    return out[:, : tokens * heads].reshape(x.q_latent.shape)


def _kernel(
    count, table, last, q_latent, q_rope, latents, rope_keys, *refs, page: int, scale: float, first: int
):  # fmt: skip
    *scales, out, largest, total, attended = refs
    b, n = pl.program_id(0), pl.program_id(1)

    @pl.when(n == 0)
    def _():
        largest[...] = jnp.full_like(largest, LOWEST)
        total[...] = jnp.zeros_like(total)
        attended[...] = jnp.zeros_like(attended)

    @pl.when(n < count[b])
    def _():
        latent = latents[...].astype(q_latent.dtype)
        logits = product(q_latent[...], latent, (1, 1))
        logits = logits * scales[0][...] if scales else logits
        logits += product(q_rope[...], rope_keys[...], (1, 1))
        entry = lax.broadcasted_iota(jnp.int32, logits.shape, 1) + n * page
        visible = last[:, :1] >= entry
        if first:
            visible &= entry >= first
        logits = jnp.where(visible, logits * scale, HIDDEN)
        before = largest[:, :1]
        now = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
        weights, shrink = jnp.exp(logits - now), jnp.exp(before - now)
        largest[...] = jnp.broadcast_to(now, largest.shape)
        total[...] = jnp.broadcast_to(total[:, :1] * shrink + jnp.sum(weights, axis=1, keepdims=True), total.shape)
        weights = weights * scales[0][...] if scales else weights
        attended[...] = attended[...] * shrink + product(weights.astype(latent.dtype), latent, (1, 0))

    @pl.when(n == pl.num_programs(1) - 1)
    def _():
        out[...] = (attended[...] / jnp.maximum(total[:, :1], 1e-30)).astype(out.dtype)
