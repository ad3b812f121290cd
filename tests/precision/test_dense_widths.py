"""Checks that FP8 products of small and odd sizes and their gradients lower for Hopper."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from dsv3_jax.precision import Precision, linear
from pallas_kernels.hopper_launch import hopper_target


@pytest.mark.parametrize(("m", "k", "n"), [(128, 256, 40), (33, 24, 5)])
def test_any_sizes_lower_for_hopper(m: int, k: int, n: int) -> None:
    """40 columns of bfloat16 are 80 bytes, a multiple only of 16-byte swizzles, which do not exist."""

    def gradients(x: jax.Array, w: jax.Array) -> tuple[jax.Array, ...]:
        out, pull = jax.vjp(lambda x, w: linear(x, w, Precision.preset("fp8")), x, w)
        return pull(out)

    operands = [jax.ShapeDtypeStruct((m, k), jnp.bfloat16), jax.ShapeDtypeStruct((n, k), jnp.float32)]
    with hopper_target():
        lowered = jax.jit(gradients).trace(*operands).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("mosaic_gpu") > 3
