"""Checks the grouped kernels in the interpreters against the reference, Hopper's with race detection."""

from __future__ import annotations

import functools

import jax
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest
from interpreted import interpreted_hopper

import pallas_kernels as pk
from pallas_kernels.grouped_matmul import hopper, tpu
from pallas_kernels.grouped_matmul.tiling import Tiling, candidates, choose_tiling

ROWS, OUT, IN = 512, 144, 208  # a multiple of the tile only in the rows
SIZES = {
    "an empty group, ragged counts, rows to spare": [128, 0, 256],
    "one group with everything": [0, 512, 0],
    "nothing": [0, 0, 0],
}
TILINGS = (Tiling(128, 3, 2), Tiling(64, 2, 1), Tiling(192, 2, 2))


@functools.cache
def operands(fp8: bool):
    """Returns rows, weights and the gradient of the product; for FP8 quantised, with the rows' transposed forms."""
    keys = jax.random.split(jax.random.key(0), 3)
    lhs, rhs = jax.random.normal(keys[0], (ROWS, IN)), jax.random.normal(keys[1], (3, OUT, IN))
    out_bar = jax.random.normal(keys[2], (ROWS, OUT))
    if fp8:
        rows, columns = pk.quantize_both(lhs)
        return rows, pk.quantize(rhs, tile="128x128"), columns, pk.quantize_both(out_bar)[1]
    lhs, rhs, out_bar = (x.astype(jnp.bfloat16) for x in (lhs, rhs, out_bar))
    return lhs, rhs, lhs, out_bar


def by_form(form: str, fp8: bool, sizes: list[int]):
    """Returns a call of each form, as function(kernels, **options), and the reference's result."""
    lhs, rhs, columns, out_bar = operands(fp8)
    group_sizes = jnp.asarray(sizes, jnp.int32)
    f32 = jnp.float32
    if form == "rows":
        wanted = pk.grouped_matmul(lhs, rhs, group_sizes, row_alignment=128, out_dtype=f32)
        return (lambda kernels, **options: kernels.rows_by_weights(lhs, rhs, group_sizes, f32, **options)), wanted
    if form == "transposed":
        weights = rhs.swapaxes(1, 2)
        wanted = pk.grouped_matmul(lhs, rhs, group_sizes, row_alignment=128, out_dtype=f32)
        call = lambda kernels, **options: kernels.rows_by_weights(  # noqa: E731
            lhs, weights, group_sizes, f32, transposed=True, **options
        )
        return call, wanted
    if form == "depth":
        wanted = pk.grouped_weight_gradient(out_bar, columns, group_sizes, row_alignment=128)
        return (lambda kernels, **options: kernels.rows_by_rows(out_bar, columns, group_sizes, **options)), wanted
    if form == "depth, added":
        before = jax.random.normal(jax.random.key(2), (3, OUT, IN), f32)
        wanted = pk.grouped_weight_gradient(out_bar, columns, group_sizes, accumulator=before, row_alignment=128)
        arguments = out_bar, columns, group_sizes, before
        return (lambda kernels, **options: kernels.rows_by_rows(*arguments, **options)), wanted
    if form == "depth in parts":
        # The second part has other rows and other sizes; the sum is added to an accumulator.
        parts = jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), (out_bar, columns))
        of_parts = jnp.stack([group_sizes, group_sizes[::-1]])
        alone = (jax.tree.map(lambda x, part=part: x[part], parts) for part in (0, 1))
        before = wanted = jax.random.normal(jax.random.key(2), (3, OUT, IN), f32)
        for part, sizes_of_part in zip(alone, of_parts, strict=True):
            wanted = wanted + pk.grouped_weight_gradient(*part, sizes_of_part, row_alignment=128)
        return (lambda kernels, **options: kernels.rows_by_rows(*parts, of_parts, before, **options)), wanted
    counts = jnp.asarray(np.minimum(sizes, 130) // 2, jnp.int32)
    rows = jax.tree.map(lambda x: x[:390].reshape(3, 130, -1), lhs)
    wanted = pk.masked_grouped_matmul(rows, rhs, counts, out_dtype=f32)
    return (lambda kernels, **options: kernels.masked(rows, rhs, counts, f32, **options)), wanted


FORMS = [("rows", False), ("transposed", False), ("depth", False), ("masked", False)]
FORMS += [("rows", True), ("depth", True), ("masked", True), ("depth, added", True)]
FORMS += [("depth in parts", False), ("depth in parts", True)]


def check(got, wanted) -> None:
    assert got.shape == wanted.shape
    # The kernels add up to 512 float32 products of size 1 in another order.
    np.testing.assert_allclose(got, wanted, atol=1e-4)


@pytest.mark.parametrize(
    ("form", "fp8", "tiling"),
    [
        *((*form, TILINGS[0]) for form in FORMS),
        *(("rows", True, tiling) for tiling in TILINGS[1:]),
        ("depth", False, TILINGS[1]),
    ],
)
def test_hopper(form, fp8, tiling):
    call, wanted = by_form(form, fp8, SIZES["an empty group, ragged counts, rows to spare"])
    with interpreted_hopper() as interpret:
        check(call(hopper, tiling=tiling, interpret=interpret), wanted)


@pytest.mark.parametrize(
    ("form", "fp8", "sizes"),
    [
        ("rows", True, "one group with everything"),
        ("depth", True, "nothing"),
        ("depth", False, "nothing"),
        ("depth in parts", True, "nothing"),
        ("depth in parts", True, "one group with everything"),
    ],
)
def test_hopper_at_the_extremes(form, fp8, sizes):
    call, wanted = by_form(form, fp8, SIZES[sizes])
    with interpreted_hopper() as interpret:
        check(call(hopper, tiling=TILINGS[0], interpret=interpret), wanted)


@pytest.mark.parametrize(("form", "fp8"), FORMS)
def test_tpu(form, fp8):
    for sizes in SIZES.values() if "depth" in form else list(SIZES.values())[:1]:
        call, wanted = by_form(form, fp8, sizes)
        check(call(tpu, interpret=pltpu.InterpretParams()), wanted)


ANY_SIZES = {"ragged, an empty group, rows to spare": [33, 0, 129], "one group with everything": [0, 200, 0]}


@pytest.mark.parametrize("sizes", ANY_SIZES.values(), ids=ANY_SIZES)
@pytest.mark.parametrize(("device", "kernels"), [("hopper", hopper), ("tpu", tpu)])
def test_sizes_that_are_no_multiple_of_the_tile(device, kernels, sizes, on_device):
    """The public functions pad rows for the kernels and undo it: product, both gradients, the FP8 product."""
    keys = jax.random.split(jax.random.key(1), 3)
    lhs, rhs, out_bar = (
        jax.random.normal(key, shape, jnp.bfloat16)
        for key, shape in zip(keys, ((200, 64), (3, 72, 64), (200, 72)), strict=True)
    )
    quantized = pk.quantize(lhs, tile="1x128"), pk.quantize(rhs, tile="128x128")
    group_sizes = jnp.asarray(sizes, jnp.int32)

    def all_products(implementation):
        def product(lhs, rhs):
            return pk.grouped_matmul(lhs, rhs, group_sizes, out_dtype=jnp.float32, implementation=implementation)

        out, pull = jax.vjp(product, lhs, rhs)
        return product(*quantized), out, *pull(out_bar.astype(jnp.float32))

    with on_device(device, kernels, "rows_by_weights", "rows_by_rows"):
        got = jax.block_until_ready(all_products(device))
    one_step = 2.0**-7  # gradients are rounded to bfloat16 once
    for a, b, rtol in zip(got, all_products("reference"), (0, 0, one_step, one_step), strict=True):
        np.testing.assert_allclose(a.astype("f4"), b.astype("f4"), rtol=rtol, atol=1e-4)


def test_an_unfit_tiling_is_refused():
    with pytest.raises(ValueError, match="tile_n of 64, 128, 192 or 256"):
        Tiling(96, 3)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("groups_along", ["rows", "depth"])
def test_every_problem_gets_a_tiling_that_fits(groups_along, fp8):
    out_bytes = 2 if groups_along == "rows" else 4
    cuts = candidates(groups_along, fp8, out_bytes)
    assert all(cut.fits(fp8, out_bytes) for cut in cuts)
    for columns, contraction in ((1, 1), (130, 7168), (4096, 7168), (7168, 2048), (2048, 32768)):
        assert choose_tiling(groups_along, columns, contraction, 8, fp8, out_bytes) in cuts
    # Half a cluster's columns would be wasted on a narrow product.
    assert choose_tiling(groups_along, 64, 7168, 8, fp8, out_bytes).cluster == 1
