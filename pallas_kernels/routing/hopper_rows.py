"""Moves rows to expert order and back on Hopper, in Mosaic GPU. Memory bounds the time, so every row is moved once.

Each kernel goes from token to token: a token's row is read once and written to its K rows, or its K rows are read and
one sum is written. TMA moves whole pieces of rows to and from indices in registers. A producer warpgroup keeps a ring
of shared-memory stages full, and the other warpgroup computes and sends. Two blocks share a multiprocessor.

    permute            x[t]               -> rows[row of (t, k)] for every k
    combine            rows[rows of t]    -> sum over k of gate[t, k] * row
    combine_gradient   both               -> out_bar[t] * gate[t, k] to each row, and <row, out_bar[t]> for each gate

Rows are reshaped to [.., pieces, lanes] since TMA moves at most 256 elements along an axis.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.device import once_a_program
from pallas_kernels.hopper_launch import SHARED_MEMORY_BYTES, multiprocessors

LANES = 128  # elements of a piece; the width of a row must be a multiple
_BLOCKS = 2  # blocks per multiprocessor
_RING_BYTES = SHARED_MEMORY_BYTES // _BLOCKS - 16 * 1024
_MOST_STAGES = 8
_CHUNK = 1024  # elements of a row that the warpgroup has in registers at a time: 8 per thread
_ROWS_AT_ONCE = 8  # rows of zeros whose indices are read together
_PRODUCER, _SENDER = 0, 1

Interpret = plgpu.InterpretGPUParams | None


class _Cut(NamedTuple):
    """A row as `count` chunks of `pieces` x `lanes` elements."""

    count: int
    pieces: int
    lanes: int

    @property
    def elements(self) -> int:
        return self.pieces * self.lanes

    def of(self, x: Array) -> Array:
        return x.reshape(x.shape[0], self.count * self.pieces, self.lanes)

    def at(self, chunk) -> Any:
        return pl.ds(chunk * self.pieces, self.pieces)


@once_a_program()
def permute(
    x: Float[Array, "T d"],
    row_of_slot: Int[Array, " TK"],
    slot_of_row: Int[Array, " M"],
    *,
    interpret: Interpret = None,
) -> Float[Array, "M d"]:
    """Computes `reference.permute`."""
    cut = _cut(x.shape[1], 16 * 1024 // x.dtype.itemsize)
    chosen = row_of_slot.shape[0] // x.shape[0]
    padding = _padding_rows(row_of_slot, slot_of_row)
    stages = _stages(cut.elements * x.dtype.itemsize)
    shape = (slot_of_row.shape[0], cut.count * cut.pieces, cut.lanes)
    rows = _launch(
        functools.partial(_permute_kernel, chosen=chosen, cut=cut, stages=stages),
        "permute",
        jax.ShapeDtypeStruct(shape, x.dtype),
        {
            "x_smem": plgpu.SMEM((stages, cut.pieces, cut.lanes), x.dtype),
            "filled": plgpu.Barrier(num_barriers=stages),
            "freed": plgpu.Barrier(num_barriers=stages),
            "zeros_smem": _zeros_smem(padding, cut, x.dtype),
        },
        x.shape[0],
        interpret,
    )(row_of_slot, *padding, cut.of(x))
    return rows.reshape(-1, x.shape[1])


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
    cut = _cut(width, _CHUNK)
    stages = _stages(chosen * cut.elements * rows.dtype.itemsize)
    out = _launch(
        functools.partial(_combine_kernel, chosen=chosen, cut=cut, stages=stages),
        "combine",
        jax.ShapeDtypeStruct((tokens, cut.count * cut.pieces, cut.lanes), rows.dtype),
        {
            "rows_smem": plgpu.SMEM((stages, chosen, cut.pieces, cut.lanes), rows.dtype),
            "out_smem": plgpu.SMEM((2, cut.pieces, cut.lanes), rows.dtype),
            "filled": plgpu.Barrier(num_arrivals=chosen, num_barriers=stages),
            "freed": plgpu.Barrier(num_barriers=stages),
        },
        tokens,
        interpret,
    )(row_of_slot, gate.astype(jnp.float32).reshape(-1), cut.of(rows))
    return out.reshape(tokens, width)


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
    (tokens, chosen), width = gate.shape, rows.shape[1]
    cut = _cut(width, _CHUNK)
    padding = _padding_rows(row_of_slot, slot_of_row)
    row_bytes = cut.elements * rows.dtype.itemsize
    # Besides the ring there are the rows being written: those of one step are sent while the next are computed.
    stages = _stages((chosen + 1) * row_bytes, spent=2 * chosen * row_bytes)
    rows_bar, gate_bar = _launch(
        functools.partial(_combine_gradient_kernel, chosen=chosen, cut=cut, stages=stages),
        "combine_gradient",
        [
            jax.ShapeDtypeStruct((rows.shape[0], cut.count * cut.pieces, cut.lanes), rows.dtype),
            jax.ShapeDtypeStruct((tokens * chosen,), jnp.float32),
        ],
        {
            "rows_smem": plgpu.SMEM((stages, chosen, cut.pieces, cut.lanes), rows.dtype),
            "bar_smem": plgpu.SMEM((stages, cut.pieces, cut.lanes), rows.dtype),
            "out_smem": plgpu.SMEM((2, chosen, cut.pieces, cut.lanes), rows.dtype),
            "filled": plgpu.Barrier(num_arrivals=chosen + 1, num_barriers=stages),
            "freed": plgpu.Barrier(num_barriers=stages),
            "zeros_smem": _zeros_smem(padding, cut, rows.dtype),
        },
        tokens,
        interpret,
    )(row_of_slot, *padding, gate.astype(jnp.float32).reshape(-1), cut.of(rows), cut.of(out_bar.astype(rows.dtype)))
    return rows_bar.reshape(rows.shape), gate_bar.reshape(gate.shape)


def _cut(width: int, most: int) -> _Cut:
    """Returns the cut of a row into the longest equal chunks of up to `most` elements."""
    lanes = 256 if width % 256 == 0 else LANES
    pieces = width // lanes
    longest = max(n for n in range(1, min(pieces, max(most // lanes, 1), 256) + 1) if pieces % n == 0)
    return _Cut(pieces // longest, longest, lanes)


def _stages(stage_bytes: int, spent: int = 0) -> int:
    return max(2, min((_RING_BYTES - spent) // stage_bytes, _MOST_STAGES))


def _padding_rows(row_of_slot: Array, slot_of_row: Array) -> list[Array]:
    """Returns the padding rows, then M up to a whole number of iterations; [] where there are none."""
    slots, rows = row_of_slot.shape[0], slot_of_row.shape[0]
    if rows == slots:
        return []
    empty = jnp.nonzero(slot_of_row == slots, size=rows - slots)[0].astype(jnp.int32)
    return [jnp.pad(empty, (0, -empty.shape[0] % _ROWS_AT_ONCE), constant_values=rows)]


def _zeros_smem(padding: list[Array], cut: _Cut, dtype) -> Any:
    return plgpu.SMEM((cut.pieces, cut.lanes), dtype) if padding else None


def _launch(kernel, name: str, out_type, scratch: dict[str, Any], tokens: int, interpret: Interpret):
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=scratch,
        grid=(min(tokens, _BLOCKS * multiprocessors()),),
        grid_names=("blocks",),
        num_threads=2,
        thread_name="warpgroup",
        kernel_name=name,
        interpret=interpret,
    )


def _for_each_chunk(tokens: int, cut: _Cut, body) -> Array:
    """Calls body(token, chunk, step) for all chunks of this block; returns the number of steps."""

    @plgpu.nd_loop((tokens,), collective_axes="blocks")
    def _(loop):
        @pl.loop(0, cut.count)
        def _(chunk):
            body(loop.index[0], chunk, loop.local_index * cut.count + chunk)

    blocks = lax.axis_size("blocks")
    return lax.div(tokens - lax.axis_index("blocks") + blocks - 1, blocks) * cut.count


def _fill_ring(tokens: int, cut: _Cut, stages: int, filled, freed, copy) -> None:
    """The producer: calls copy(token, chunk, stage, barrier) for all chunks of this block, each when its stage is free.

    It ends when the last stage is free, so that no barrier is dropped before all its arrivals are waited for.
    """

    def fill_stage(token, chunk, step):
        stage = lax.rem(step, stages)

        @pl.when(step >= stages)
        def _():
            plgpu.barrier_wait(freed.at[stage])

        copy(token, chunk, stage, filled.at[stage])

    steps = _for_each_chunk(tokens, cut, fill_stage)

    @pl.loop(jnp.maximum(steps - stages, 0), steps)
    def _(step):
        plgpu.barrier_wait(freed.at[lax.rem(step, stages)])


def _permute_kernel(
    row_of_slot, *refs, chosen: int, cut: _Cut, stages: int, x_smem, filled, freed, zeros_smem
):  # fmt: skip
    *padding, x, rows = refs
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == _PRODUCER)
    def _():
        def copy(token, chunk, stage, arrived):
            plgpu.copy_gmem_to_smem(x.at[token, cut.at(chunk)], x_smem.at[stage], arrived)

        _fill_ring(x.shape[0], cut, stages, filled, freed, copy)

    @pl.when(warpgroup == _SENDER)
    def _():
        def send(token, chunk, step):
            stage = lax.rem(step, stages)
            targets = [row_of_slot[token * chosen + k] for k in range(chosen)]
            plgpu.barrier_wait(filled.at[stage])
            for target in targets:
                plgpu.copy_smem_to_gmem(x_smem.at[stage], rows.at[target, cut.at(chunk)])
            # The previous step's copies have left shared memory; this step's may still be in flight.
            plgpu.wait_smem_to_gmem(chosen, wait_read_only=True)

            @pl.when(step > 0)
            def _():
                plgpu.barrier_arrive(freed.at[lax.rem(step - 1, stages)])

        steps = _for_each_chunk(x.shape[0], cut, send)
        _write_zeros(padding, rows, zeros_smem, cut)
        plgpu.wait_smem_to_gmem(0)
        plgpu.barrier_arrive(freed.at[lax.rem(steps - 1, stages)])


def _combine_kernel(
    row_of_slot, gate, rows, out, *, chosen: int, cut: _Cut, stages: int, rows_smem, out_smem, filled, freed
):  # fmt: skip
    warpgroup = lax.axis_index("warpgroup")
    load = functools.partial(_load, layout=_layout(cut, rows.dtype))

    @pl.when(warpgroup == _PRODUCER)
    def _():
        def copy(token, chunk, stage, arrived):
            targets = [row_of_slot[token * chosen + k] for k in range(chosen)]
            for k, target in enumerate(targets):
                plgpu.copy_gmem_to_smem(rows.at[target, cut.at(chunk)], rows_smem.at[stage, k], arrived)

        _fill_ring(out.shape[0], cut, stages, filled, freed, copy)

    @pl.when(warpgroup == _SENDER)
    def _():
        def send(token, chunk, step):
            stage = lax.rem(step, stages)
            gates = [gate[token * chosen + k] for k in range(chosen)]
            plgpu.barrier_wait(filled.at[stage])
            total = load(rows_smem.at[stage, 0]) * gates[0]
            for k in range(1, chosen):
                total = total + load(rows_smem.at[stage, k]) * gates[k]
            plgpu.commit_smem()  # orders these reads before TMA's next write
            plgpu.barrier_arrive(freed.at[stage])
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            leaving = out_smem.at[lax.rem(step, 2)]
            leaving[...] = total.astype(out.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(leaving, out.at[token, cut.at(chunk)])

        _for_each_chunk(out.shape[0], cut, send)
        plgpu.wait_smem_to_gmem(0)


def _combine_gradient_kernel(
    row_of_slot, *refs, chosen: int, cut: _Cut, stages: int,
    rows_smem, bar_smem, out_smem, filled, freed, zeros_smem,
):  # fmt: skip
    *padding, gate, rows, out_bar, rows_bar, gate_bar = refs
    tokens = out_bar.shape[0]
    warpgroup = lax.axis_index("warpgroup")
    layout = _layout(cut, rows.dtype)
    load = functools.partial(_load, layout=layout)

    @pl.when(warpgroup == _PRODUCER)
    def _():
        def copy(token, chunk, stage, arrived):
            targets = [row_of_slot[token * chosen + k] for k in range(chosen)]
            plgpu.copy_gmem_to_smem(out_bar.at[token, cut.at(chunk)], bar_smem.at[stage], arrived)
            for k, target in enumerate(targets):
                plgpu.copy_gmem_to_smem(rows.at[target, cut.at(chunk)], rows_smem.at[stage, k], arrived)

        _fill_ring(tokens, cut, stages, filled, freed, copy)

    @pl.when(warpgroup == _SENDER)
    def _():
        @plgpu.nd_loop((tokens,), collective_axes="blocks")
        def _(loop):
            (token,) = loop.index
            slots = [token * chosen + k for k in range(chosen)]
            targets, gates = [row_of_slot[slot] for slot in slots], [gate[slot] for slot in slots]

            def one_chunk(chunk, products):
                step = loop.local_index * cut.count + chunk
                stage, leaving = lax.rem(step, stages), out_smem.at[lax.rem(step, 2)]
                plgpu.barrier_wait(filled.at[stage])
                plgpu.wait_smem_to_gmem(chosen, wait_read_only=True)
                bar = load(bar_smem.at[stage])
                summed = []
                for k in range(chosen):
                    summed.append(products[k] + load(rows_smem.at[stage, k]) * bar)
                    leaving[k] = (bar * gates[k]).astype(rows.dtype)
                plgpu.commit_smem()  # also orders these reads before TMA's next write
                plgpu.barrier_arrive(freed.at[stage])
                for k in range(chosen):
                    plgpu.copy_smem_to_gmem(leaving.at[k], rows_bar.at[targets[k], cut.at(chunk)])
                return tuple(summed)

            zeros = plgpu.layout_cast(jnp.zeros((cut.pieces, cut.lanes), jnp.float32), layout)
            products = lax.fori_loop(0, cut.count, one_chunk, (zeros,) * chosen)
            for k in range(chosen):
                gate_bar[slots[k]] = jnp.sum(products[k])

        _write_zeros(padding, rows_bar, zeros_smem, cut)
        plgpu.wait_smem_to_gmem(0)


def _write_zeros(padding, rows, zeros_smem, cut: _Cut) -> None:
    """Writes zeros to the rows that `padding` lists, several at a time."""
    if not padding:
        return
    zeros_smem[...] = plgpu.layout_cast(jnp.zeros(zeros_smem.shape, zeros_smem.dtype), _layout(cut, zeros_smem.dtype))
    plgpu.commit_smem()

    @plgpu.nd_loop((padding[0].shape[0] // _ROWS_AT_ONCE, cut.count), collective_axes="blocks")
    def _(loop):
        some, chunk = loop.index
        targets = [padding[0][some * _ROWS_AT_ONCE + i] for i in range(_ROWS_AT_ONCE)]
        for target in targets:

            @pl.when(target < rows.shape[0])
            def _(target=target):
                plgpu.copy_smem_to_gmem(zeros_smem, rows.at[target, cut.at(chunk)])


def _layout(cut: _Cut, dtype) -> Any:
    """Returns the layout with neighbouring elements in one thread, 16 bytes where the chunk is long enough."""
    vector = math.gcd(cut.elements // 128, 16 // jnp.dtype(dtype).itemsize)
    return plgpu.Layout.WG_STRIDED((cut.pieces, cut.lanes), vec_size=vector)


def _load(ref, layout) -> Float[Array, "pieces lanes"]:
    return plgpu.load(ref, layout=layout).astype(jnp.float32)
