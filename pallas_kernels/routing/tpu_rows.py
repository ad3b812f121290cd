"""Moves rows to expert order and back on TPUs, in Mosaic TPU: single rows are fetched by DMA, one tile ahead.

Two rows of bfloat16 share 32-bit words, and a DMA cannot copy one without the other. So XLA first packs the left half
of each bfloat16 row with its right half, in one pass over the array that is gathered from, and the kernels unpack them
in VMEM. Float32 rows are copied as they are.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt32

from pallas_kernels.device import once_a_program

ROWS = 64  # rows of a tile in expert order
TOKENS = 16  # tokens of a tile in token order
_VMEM_BYTES = 48 << 20

Interpret = pltpu.InterpretParams | None


@once_a_program()
def permute(
    x: Float[Array, "T d"],
    row_of_slot: Int[Array, " TK"],
    slot_of_row: Int[Array, " M"],
    *,
    interpret: Interpret = None,
) -> Float[Array, "M d"]:
    """Computes `reference.permute`."""
    shape = (slot_of_row.shape[0], x.shape[1])
    (rows,) = _by_row(
        functools.partial(_permute_kernel, width=x.shape[1]),
        "permute",
        x,
        slot_of_row // (row_of_slot.shape[0] // x.shape[0]),
        [],
        [jax.ShapeDtypeStruct(shape, x.dtype)],
        interpret,
    )
    return rows


@once_a_program()
def combine_gradient(
    rows: Float[Array, "M d"],
    gate: Float[Array, "T K"],
    out_bar: Float[Array, "T d"],
    row_of_slot: Int[Array, " TK"],
    slot_of_row: Int[Array, " M"],
    *,
    interpret: Interpret = None,
) -> tuple[Float[Array, "M d"], Float[Array, "T K"]]:
    """Computes `reference.combine_gradient`."""
    gate_of_row = gate.astype(jnp.float32).reshape(-1).at[slot_of_row].get(mode="fill", fill_value=0)
    rows_bar, products = _by_row(
        _combine_gradient_kernel,
        "combine_gradient",
        out_bar.astype(rows.dtype),
        slot_of_row // gate.shape[1],
        [rows, gate_of_row[:, None]],
        [jax.ShapeDtypeStruct(rows.shape, rows.dtype), jax.ShapeDtypeStruct((rows.shape[0], 1), jnp.float32)],
        interpret,
    )
    return rows_bar, products[row_of_slot, 0].reshape(gate.shape)


@once_a_program()
def combine(
    rows: Float[Array, "M d"],
    gate: Float[Array, "T K"],
    row_of_slot: Int[Array, " TK"],
    *,
    interpret: Interpret = None,
) -> Float[Array, "T d"]:
    """Computes `reference.combine`."""
    (tokens, chosen), width = gate.shape, rows.shape[1]
    tiles = pl.cdiv(tokens, TOKENS)
    excess = tiles * TOKENS - tokens
    packed = _packed(rows)
    return pl.pallas_call(
        functools.partial(_combine_kernel, chosen=chosen),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(tiles,),
            in_specs=[
                pl.BlockSpec((TOKENS, chosen), lambda i, row_indices: (i, 0)),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=pl.BlockSpec((TOKENS, width), lambda i, row_indices: (i, 0)),
            scratch_shapes=[
                pltpu.VMEM((2, chosen, TOKENS, packed.shape[1]), packed.dtype),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((tokens, width), rows.dtype),
        compiler_params=_parameters(),
        interpret=interpret or False,
        name="combine",
    )(jnp.pad(row_of_slot, (0, excess * chosen)), gate.astype(jnp.float32), packed)


def _by_row(kernel, name: str, x, token_of_row, others: list[Array], out_shape: list[Any], interpret: Interpret):
    """Runs `kernel` over tiles of rows in expert order, with the rows of `x` they come from and tiles of `others`."""
    rows = token_of_row.shape[0]
    tiles = pl.cdiv(rows, ROWS)
    # Padding rows, and rows past the end, come from a row of zeros that is appended.
    token_of_row = jnp.pad(jnp.minimum(token_of_row, x.shape[0]), (0, tiles * ROWS - rows), constant_values=x.shape[0])
    packed = jnp.pad(_packed(x), ((0, 1), (0, 0)))

    def tile(width: int):
        return pl.BlockSpec((ROWS, width), lambda i, tokens: (i, 0))

    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(tiles,),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY), *(tile(other.shape[1]) for other in others)],
            out_specs=[tile(out.shape[1]) for out in out_shape],
            scratch_shapes=[pltpu.VMEM((2, ROWS, packed.shape[1]), packed.dtype), pltpu.SemaphoreType.DMA((2,))],
        ),
        out_shape=out_shape,
        compiler_params=_parameters(),
        interpret=interpret or False,
        name=name,
    )(token_of_row, packed, *others)


def _parameters() -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=_VMEM_BYTES)


def _permute_kernel(token_ref, x_ref, out_ref, fetched_ref, semaphores, *, width: int):
    parts = _parts(_fetch_rows(token_ref, x_ref, fetched_ref, semaphores), out_ref.dtype)
    for at, part in zip(_columns(width, len(parts)), parts, strict=True):
        out_ref[:, at] = part.astype(out_ref.dtype)


def _combine_gradient_kernel(
    token_ref, out_bar_ref, rows_ref, gate_ref, rows_bar_ref, product_ref, fetched_ref, semaphores
):
    parts = _parts(_fetch_rows(token_ref, out_bar_ref, fetched_ref, semaphores), rows_ref.dtype)
    product = jnp.zeros(product_ref.shape, jnp.float32)
    for at, part in zip(_columns(rows_ref.shape[1], len(parts)), parts, strict=True):
        rows_bar_ref[:, at] = (part * gate_ref[...]).astype(rows_bar_ref.dtype)
        product += jnp.sum(rows_ref[:, at].astype(jnp.float32) * part, axis=1, keepdims=True)
    product_ref[...] = product


def _combine_kernel(row_ref, gate_ref, rows_ref, out_ref, fetched_ref, semaphores, *, chosen: int):
    def copies(tile, slot):
        def copy(i):
            token, k = lax.div(i, chosen), lax.rem(i, chosen)
            source = rows_ref.at[pl.ds(row_ref[tile * TOKENS * chosen + i], 1)]
            return pltpu.make_async_copy(source, fetched_ref.at[slot, k, pl.ds(token, 1)], semaphores.at[slot])

        return copy

    slot = _fetch_ahead(copies, TOKENS * chosen)
    for half, at in enumerate(_columns(out_ref.shape[1], _halves(out_ref.dtype))):
        total = jnp.zeros((TOKENS, at.size), jnp.float32)
        for k in range(chosen):
            total += _parts(fetched_ref[slot, k], out_ref.dtype)[half] * gate_ref[:, pl.ds(k, 1)]
        out_ref[:, at] = total.astype(out_ref.dtype)


def _fetch_rows(token_ref, x_ref, fetched_ref, semaphores) -> Array:
    def copies(tile, slot):
        def copy(i):
            source = x_ref.at[pl.ds(token_ref[tile * ROWS + i], 1)]
            return pltpu.make_async_copy(source, fetched_ref.at[slot, pl.ds(i, 1)], semaphores.at[slot])

        return copy

    return fetched_ref[_fetch_ahead(copies, ROWS)]


def _fetch_ahead(copies, count: int) -> Array:
    """Starts the copies of the next tile and waits for those of this one; returns the index of their buffer.

    `copies(tile, buffer)` returns a function from 0 .. count - 1 to a copy.
    """
    tile = pl.program_id(0)
    slot = lax.rem(tile, 2)

    def start(tile, slot):
        copy = copies(tile, slot)
        lax.fori_loop(0, count, lambda i, _: copy(i).start(), None)

    @pl.when(tile == 0)
    def _():
        start(tile, slot)

    @pl.when(tile + 1 < pl.num_programs(0))
    def _():
        start(tile + 1, 1 - slot)

    copy = copies(tile, slot)
    lax.fori_loop(0, count, lambda i, _: copy(i).wait(), None)
    return slot


def _halves(dtype) -> int:
    """Returns how many numbers of `dtype` a 32-bit word holds."""
    return 4 // jnp.dtype(dtype).itemsize


def _columns(width: int, parts: int) -> list[pl.Slice]:
    return [pl.ds(part * (width // parts), width // parts) for part in range(parts)]


def _packed(x: Float[Array, "n d"]) -> Array:
    """Returns rows of 32-bit words: float32 as it is, bfloat16 with the left half of a row in the low bits."""
    if _halves(x.dtype) == 1:
        return x
    left, right = jnp.split(lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32), 2, axis=1)
    return left | (right << 16)


def _parts(words: Array, dtype) -> list[Float[Array, "n part"]]:
    """Undoes `_packed`, in float32: a bfloat16 is the upper half of a float32."""
    if _halves(dtype) == 1:
        return [words]
    bits: UInt32[Array, "n part"] = words
    return [lax.bitcast_convert_type(part, jnp.float32) for part in (bits << 16, bits & jnp.uint32(0xFFFF0000))]
