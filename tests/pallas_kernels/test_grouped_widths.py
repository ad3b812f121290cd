"""Checks that grouped products of small and odd widths lower for Hopper; the interpreter has none of its layouts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels as pk
from pallas_kernels.grouped_matmul import hopper
from pallas_kernels.hopper_launch import hopper_target


@pytest.mark.parametrize(("width", "other"), [(16, 32), (96, 64)])
@pytest.mark.parametrize("form", ["rows", "transposed", "depth"])
def test_any_widths_lower_for_hopper(form: str, width: int, other: int) -> None:
    sizes = jax.ShapeDtypeStruct((2,), jnp.int32)
    shapes = {
        "rows": ((256, width), (2, other, width)),
        "transposed": ((256, width), (2, width, other)),
        "depth": ((256, other), (256, width)),
    }
    rows = functools.partial(hopper.rows_by_weights, out_dtype=jnp.bfloat16, transposed=form == "transposed")
    function = hopper.rows_by_rows if form == "depth" else rows
    operands = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes[form]]
    check_lowers(function, operands, sizes)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("out", [8, 24, 40])
def test_rows_of_a_result_that_are_no_multiple_of_a_swizzle_are_padded(fp8: bool, out: int) -> None:
    """A row of 8, 24 or 40 numbers in bfloat16 is 16 bytes more than a multiple of 32, the narrowest swizzle."""
    sizes = jax.ShapeDtypeStruct((2,), jnp.int32)
    rows, weights = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((256, 64), (2, out, 64)))

    def product(rows: jax.Array, weights: jax.Array, sizes: jax.Array) -> jax.Array:
        operands = (rows, weights)
        if fp8:
            operands = pk.quantize(rows, tile="1x128"), pk.quantize(weights, tile="128x128")
        return pk.grouped_matmul(*operands, sizes, row_alignment=128, out_dtype=jnp.bfloat16)

    check_lowers(product, [rows, weights], sizes)


def check_lowers(function: Callable[..., jax.Array], operands: Sequence[Any], sizes: Any) -> None:
    with hopper_target():
        lowered = jax.jit(function).trace(*operands, sizes).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()
