"""The forward pass of training attention on TPUs, in Mosaic TPU: online softmax over tiles of keys.

The grid goes over batch, heads, tiles of queries and, innermost, tiles of keys; a row's maximum, sum and result stay in
VMEM while the pipeline fetches the next tile of keys and values. Tiles that hold no visible pair are skipped:
tables say which tiles of keys each tile of queries sees. Operands are transposed to [batch, heads, positions, width].
"""

from __future__ import annotations

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.device import LANES, once_a_program
from pallas_kernels.latent_attention.operands import Operands
from pallas_kernels.latent_attention.tiles import key_tiles
from pallas_kernels.latent_attention.tpu_form import (
    LOWEST,
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
def forward(
    x: Operands, scale: float, causal: bool, *, interpret: Interpret = None
) -> tuple[Float[Array, "B T H v"], Float[Array, "B H T"]]:
    """Returns the attended values and the natural logarithm of each row's sum of exponentials, in float32."""
    q, k, v, k_shared, segment_ids = x
    batch, length, heads, width = q.shape
    form = make_form(length, scale, causal)
    tables = key_tiles(segment_ids, batch, length, form.tile, form.tile, causal)
    own = k.shape[-1]

    def of_query(*sizes):
        return pl.BlockSpec((None, None, form.tile, *sizes), lambda b, h, i, j, first, end: (b, h, i, 0))

    def at_key(b, i, j, first, end):
        # A tile past the last one is not fetched.
        return jnp.minimum(first[b, i] + j, end[b, i] - 1)

    def of_key(size):
        return pl.BlockSpec(
            (None, None, form.tile, size), lambda b, h, i, j, first, end: (b, h, at_key(b, i, j, first, end), 0)
        )

    operands = [by_head(array, form) for array in (q, k, v)]
    in_specs = [of_query(width), of_key(own), of_key(v.shape[-1])]
    if k_shared is not None:
        operands.append(padded(k_shared, form.tile, 1))
        in_specs.append(
            pl.BlockSpec(
                (None, form.tile, width - own), lambda b, h, i, j, first, end: (b, at_key(b, i, j, first, end), 0)
            )
        )
    ids = ids_of(segment_ids, form)
    if ids:
        in_specs += [
            pl.BlockSpec((1, 1, form.tile), lambda b, h, i, j, first, end: (b, 0, at_key(b, i, j, first, end))),
            pl.BlockSpec((1, form.tile, LANES), lambda b, h, i, j, first, end: (b, i, 0)),
        ]
    positions = form.tiles * form.tile
    out, log_sums = pl.pallas_call(
        functools.partial(_kernel, form=form, own=own, shared=k_shared is not None),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, heads, form.tiles, form.tiles),
            in_specs=in_specs,
            out_specs=[
                of_query(v.shape[-1]),
                pl.BlockSpec((None, None, 1, form.tile), lambda b, h, i, j, first, end: (b, h, 0, i)),
            ],
            scratch_shapes=[
                pltpu.VMEM((form.tile, LANES), jnp.float32),
                pltpu.VMEM((form.tile, LANES), jnp.float32),
                pltpu.VMEM((form.tile, v.shape[-1]), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch, heads, positions, v.shape[-1]), v.dtype),
            jax.ShapeDtypeStruct((batch, heads, 1, positions), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=interpret or False,
        name="latent_attention_forward",
    )(*tables, *operands, *ids)
    return by_position(out, form), log_sums[:, :, 0, :length]


def _kernel(first, end, q, k, v, *refs, form: Form, own: int, shared: bool):
    *ids, out, log_sums, largest, total, attended = refs
    k_shared = ids.pop(0) if shared else None
    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    count = end[b, i] - first[b, i]

    @pl.when(j == 0)
    def _():
        largest[...] = jnp.full_like(largest, LOWEST)
        total[...] = jnp.zeros_like(total)
        attended[...] = jnp.zeros_like(attended)

    def attend(masked: bool):
        logits = product(q[:, :own], k[...], (1, 1))
        if k_shared is not None:
            logits += product(q[:, own:], k_shared[...], (1, 1))
        logits *= form.scale
        if masked:
            logits = mask(logits, form, i, first[b, i] + j, ids, keys_in_rows=False)
        before = largest[:, :1]
        now = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
        weights = jnp.exp(logits - now)
        shrink = jnp.exp(before - now)
        largest[...] = jnp.broadcast_to(now, largest.shape)
        total[...] = jnp.broadcast_to(total[:, :1] * shrink + jnp.sum(weights, axis=1, keepdims=True), total.shape)
        attended[...] = attended[...] * shrink + product(weights.astype(v.dtype), v[...], (1, 0))

    @pl.when(j < count)
    def _():
        masked_where_needed(form, i, first[b, i] + j, ids, attend)

    @pl.when(j == count - 1)
    def _():
        out[...] = (attended[...] / total[:, :1]).astype(out.dtype)
        log_sums[...] = (largest[...] + jnp.log(total[...])).T[:1]
