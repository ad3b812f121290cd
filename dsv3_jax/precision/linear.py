"""The two linear maps of the model under a precision recipe: one matrix, and one matrix an expert."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

import pallas_kernels
from dsv3_jax.precision.recipe import Precision


def linear(
    x: Float[Array, "*batch in"], weight: Float[Array, "out in"], precision: Precision
) -> Float[Array, "*batch out"]:
    """y = W x with operands in the recipe's dtype; products are summed in float32 and returned in that dtype."""
    dtype = precision.dtype
    contract_last = (((x.ndim - 1,), (1,)), ((), ()))
    return lax.dot_general(x.astype(dtype), weight.astype(dtype), contract_last, preferred_element_type=dtype)


def grouped_linear(
    rows: Float[Array, "M in"],
    weights: Float[Array, "E out in"],
    group_sizes: Int[Array, " E"],
    *,
    row_alignment: int,
    precision: Precision,
) -> Float[Array, "M out"]:
    """y_r = W_e x_r for rows sorted by expert e, `group_sizes[e]` of them each (multiples of `row_alignment`)."""
    dtype = precision.dtype
    return pallas_kernels.grouped_matmul(
        rows.astype(dtype),
        weights.astype(dtype),
        group_sizes,
        row_alignment=row_alignment,
        out_dtype=jnp.dtype(dtype),
    )
