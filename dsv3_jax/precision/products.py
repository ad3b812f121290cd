"""The products of a linear map over FP8 tiles, for one matrix and for one per expert (report figure 6).

Operands in tiles that `pallas_kernels` knows are multiplied there; all others are dequantized to float32 first.
Without promotion a tensor core's accumulator is emulated. Groups of rows are multiples of 128 rows, so that no tile
along the rows belongs to two experts.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

import pallas_kernels as pk
from dsv3_jax.precision.tiles import Tiles, dequantize
from pallas_kernels import TILE

_STEP = 32  # how many products the tensor core adds at a time
_BITS = 14  # how many bits its accumulator keeps (section 3.3.2)


def rows_by_weights(
    rows: Tiles, weights: Tiles, group_sizes: Int[Array, " E"] | None, *, promotion: bool, out_dtype: jnp.dtype
) -> Float[Array, "M out"]:
    """Returns rows[r] · Wᵀ, W being that of the row's group. `weights` is [out, in], or [E, out, in] with groups."""
    if promotion and _for_kernel(rows, weights, "128x128"):
        if group_sizes is None:
            return pk.blockwise_matmul(rows, weights, out_dtype=out_dtype)  # pyright: ignore
        return pk.grouped_matmul(rows, weights, group_sizes, row_alignment=TILE, out_dtype=out_dtype)  # pyright: ignore
    x, w = dequantize(rows), dequantize(weights)
    if promotion:
        product = _plain_rows_by_weights(x, w, group_sizes)
    elif group_sizes is None:
        product = _short_sums(x[None], w[None])[0]
    else:
        blocks = x.reshape(-1, TILE, x.shape[1])
        product = _short_sums(blocks, w[_group_of_blocks(group_sizes, len(blocks))]).reshape(len(x), -1)
        product = jnp.where((jnp.arange(len(x)) < jnp.sum(group_sizes))[:, None], product, 0)
    return product.astype(out_dtype)


def rows_by_own_weights(rows: Tiles, weights: Tiles, *, promotion: bool, out_dtype: jnp.dtype) -> Float[Array, "S out"]:
    """Returns rows[s] · weights[s]ᵀ for `weights` [S, out, in], a matrix of each row's own."""
    x, w = dequantize(rows), dequantize(weights)
    if promotion:
        product = jnp.einsum("sk,snk->sn", x, w, precision=lax.Precision.HIGHEST)
    else:
        product = _short_sums(x[:, None], w)[:, 0]
    return product.astype(out_dtype)


def product_over_rows(left: Tiles, right: Tiles, *, promotion: bool) -> Float[Array, "out in"]:
    """Returns left · rightᵀ in float32, a sum over rows, for [out, M] and [in, M] in tiles along the M rows."""
    if promotion and _for_kernel(left, right, "1x128"):
        return pk.blockwise_matmul(left, right, out_dtype=jnp.float32)  # pyright: ignore
    a, b = dequantize(left), dequantize(right)
    return _contract_last(a, b) if promotion else _short_sums(a[None], b[None])[0]


def grouped_product_over_rows(
    left: Tiles,
    right: Tiles,
    group_sizes: Int[Array, "*P E"],
    *,
    promotion: bool,
    accumulator: Float[Array, "E out in"] | None = None,
) -> Float[Array, "E out in"]:
    """Returns left · rightᵀ (+ accumulator) over the rows of each expert, in float32.

    Args:
      left, right: [*P, out, M] and [*P, in, M], in tiles along the M rows.
      group_sizes: rows of each expert, in parts if there is an axis P.
    """
    options = {"accumulator": accumulator, "row_alignment": TILE}
    if promotion and _for_kernel(left, right, "1x128"):
        return pk.grouped_weight_gradient(left, right, group_sizes, **options)  # pyright: ignore
    rows = [dequantize(operand).mT for operand in (left, right)]
    if promotion:
        return pk.grouped_weight_gradient(*rows, group_sizes, **options)  # pyright: ignore
    in_parts = (x.reshape(-1, *x.shape[-2:]) for x in rows)
    product = _short_sums_by_group(*in_parts, group_sizes.reshape(-1, group_sizes.shape[-1]))  # pyright: ignore
    return product if accumulator is None else accumulator + product


def _for_kernel(left: Tiles, right: Tiles, right_tile: str) -> bool:
    both = isinstance(left, pk.Quantized) and isinstance(right, pk.Quantized)
    return both and left.tile == "1x128" and right.tile == right_tile  # pyright: ignore


def _plain_rows_by_weights(x: Array, w: Array, group_sizes: Int[Array, " E"] | None) -> Float[Array, "M out"]:
    if group_sizes is None:
        return _contract_last(x, w)
    return pk.grouped_matmul(x, w, group_sizes, row_alignment=TILE)


def _contract_last(a: Float[Array, "M K"], b: Float[Array, "N K"]) -> Float[Array, "M N"]:
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST)


def _group_of_blocks(group_sizes: Int[Array, " E"], blocks: int) -> Int[Array, " blocks"]:
    ends = jnp.cumsum(group_sizes) // TILE
    return jnp.minimum(jnp.searchsorted(ends, jnp.arange(blocks), side="right"), group_sizes.shape[0] - 1)


def _short_sums(a: Float[Array, "G M K"], b: Float[Array, "G N K"]) -> Float[Array, "G M N"]:
    """Returns a · bᵀ, each sum held in one accumulator of 14 bits."""
    k = a.shape[-1]

    def steps(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, 0), (0, -k % _STEP)))
        return jnp.moveaxis(x.reshape(*x.shape[:2], -1, _STEP), 2, 0)

    def add(total: Array, operands: tuple[Array, Array]) -> tuple[Array, None]:
        return _shortened(total, jnp.einsum("gmk,gnk->gmn", *operands, precision="highest")), None

    start = jnp.zeros((a.shape[0], a.shape[1], b.shape[1]), jnp.float32)
    return lax.scan(add, start, (steps(a), steps(b)))[0]


def _short_sums_by_group(
    a: Float[Array, "P M N"], b: Float[Array, "P M K"], group_sizes: Int[Array, "P E"]
) -> Float[Array, "E N K"]:
    """Returns aᵀ · b over the rows of each group in all parts, each sum held in one accumulator of 14 bits."""
    a = jnp.where((jnp.arange(a.shape[1]) < jnp.sum(group_sizes, axis=1)[:, None])[..., None], a, 0)
    of_part = jax.vmap(lambda sizes: _group_of_blocks(sizes, a.shape[1] // TILE))(group_sizes)
    groups = jnp.repeat(of_part.reshape(-1), TILE // _STEP)

    def add(total: Array, operands: tuple[Array, Array, Array]) -> tuple[Array, None]:
        left, right, group = operands
        return total.at[group].set(_shortened(total[group], _contract_last(left.T, right.T))), None

    start = jnp.zeros((group_sizes.shape[1], a.shape[2], b.shape[2]), jnp.float32)
    steps = (a.reshape(-1, _STEP, a.shape[2]), b.reshape(-1, _STEP, b.shape[2]), groups)
    return lax.scan(add, start, steps)[0]


def _shortened(total: Array, products: Array) -> Array:
    """Returns total + products as an accumulator of 14 bits adds them: both are cut below the 14th bit of the larger.

    The tensor core cuts each of the 32 products; here their exact sum is cut (`experiments/fp8_numerics.py` emulates
    every term).
    """
    _, exponent = jnp.frexp(jnp.maximum(jnp.abs(total), jnp.abs(products)))
    unit = jnp.ldexp(jnp.float32(1), jnp.maximum(exponent - _BITS, -126))  # a smaller one would be rounded to zero
    return (jnp.trunc(total / unit) + jnp.trunc(products / unit)) * unit
