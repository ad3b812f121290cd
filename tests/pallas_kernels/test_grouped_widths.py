"""Checks that grouped products of small and odd widths lower for Hopper; the interpreter has none of its layouts."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest

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
    with hopper_target():
        lowered = jax.jit(function).trace(*operands, sizes).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()
