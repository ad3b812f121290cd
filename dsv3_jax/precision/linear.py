"""The linear maps of the model under a precision recipe: one matrix, and one matrix an expert; plain or behind SwiGLU.

The maps behind SwiGLU are given its input, so that a recipe can keep that in a small format and recompute the rest.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

import pallas_kernels
from dsv3_jax.precision.fp8_layer import fp8_product
from dsv3_jax.precision.fp8_recipe import Role
from dsv3_jax.precision.keeping import keep
from dsv3_jax.precision.recipe import Precision
from dsv3_jax.precision.swiglu import swiglu
from pallas_kernels import TILE


def linear(
    x: Float[Array, "*batch in"],
    weight: Float[Array, "out in"],
    precision: Precision,
    *,
    after_attention: bool = False,
) -> Float[Array, "*batch out"]:
    """y = W x with operands in the recipe's dtype (or FP8); summed in float32 and returned in that dtype.

    Args:
      after_attention: x is the attention's output, which recipes keep in a format of its own.
    """
    dtype = precision.dtype
    if precision.fp8 is not None:
        role = Role(after_attention=after_attention)
        y = fp8_product(x.reshape(-1, x.shape[-1]).astype(dtype), weight, None, precision.fp8, role)
        return y.reshape(*x.shape[:-1], -1)
    if after_attention:
        x = keep(x)
    contract_last = (((x.ndim - 1,), (1,)), ((), ()))
    return lax.dot_general(x.astype(dtype), weight.astype(dtype), contract_last, preferred_element_type=dtype)


def swiglu_linear(
    gate_up: Float[Array, "*batch 2 width"], weight: Float[Array, "out width"], precision: Precision
) -> Float[Array, "*batch out"]:
    """y = W (silu(gate) * up)."""
    if precision.fp8 is None:
        return linear(swiglu(keep(gate_up)), weight, precision)
    flat = gate_up.reshape(-1, 2 * gate_up.shape[-1]).astype(precision.dtype)
    y = fp8_product(flat, weight, None, precision.fp8, Role(swiglu=True))
    return y.reshape(*gate_up.shape[:-2], -1)


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
    if precision.fp8 is not None:
        role = Role(dispatched=True)
        return _fp8_by_group(rows.astype(dtype), weights, group_sizes, row_alignment, precision, role)
    return pallas_kernels.grouped_matmul(
        rows.astype(dtype),
        weights.astype(dtype),
        group_sizes,
        row_alignment=row_alignment,
        out_dtype=jnp.dtype(dtype),
    )


def grouped_swiglu_linear(
    gate_up: Float[Array, "M 2*width"],
    weights: Float[Array, "E out width"],
    group_sizes: Int[Array, " E"],
    *,
    row_alignment: int,
    precision: Precision,
) -> Float[Array, "M out"]:
    """y_r = W_e (silu(gate_r) * up_r); each row of `gate_up` holds its gate, then its up part."""
    if precision.fp8 is None:
        hidden = swiglu(keep(gate_up).reshape(gate_up.shape[0], 2, -1))
        return grouped_linear(hidden, weights, group_sizes, row_alignment=row_alignment, precision=precision)
    role = Role(swiglu=True, gradient_dispatched=True)
    return _fp8_by_group(gate_up.astype(precision.dtype), weights, group_sizes, row_alignment, precision, role)


def _fp8_by_group(
    rows: Float[Array, "M in"],
    weights: Float[Array, "E out in"],
    group_sizes: Int[Array, " E"],
    row_alignment: int,
    precision: Precision,
    role: Role,
) -> Float[Array, "M out"]:
    """The product on groups of whole tiles: where they are not, rows move apart for it and back."""
    assert precision.fp8 is not None
    if row_alignment % TILE == 0:
        return fp8_product(rows, weights, group_sizes, precision.fp8, role)
    ends = jnp.cumsum(group_sizes)
    wide_sizes = -(-group_sizes // TILE) * TILE
    wide_ends = jnp.cumsum(wide_sizes)
    shift = (wide_ends - wide_sizes) - (ends - group_sizes)  # how far each group moves

    count, experts = rows.shape[0], group_sizes.shape[0]
    places = -(-(count + experts * (TILE - 1)) // TILE) * TILE
    group = jnp.minimum(jnp.searchsorted(wide_ends, jnp.arange(places), side="right"), experts - 1)
    source = jnp.arange(places) - shift[group]
    wide = jnp.where((source < ends[group])[:, None], rows[jnp.minimum(source, count - 1)], 0)
    out = fp8_product(wide, weights, wide_sizes, precision.fp8, role)

    own = jnp.minimum(jnp.searchsorted(ends, jnp.arange(count), side="right"), experts - 1)
    place = jnp.minimum(jnp.arange(count) + shift[own], places - 1)
    return jnp.where((jnp.arange(count) < ends[-1])[:, None], out[place], 0)
