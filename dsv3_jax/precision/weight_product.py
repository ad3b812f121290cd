"""The product of rows with a weight, W x, in formats without scales, and its gradients.

Autodiff would compute the same. Here the operands of the gradients' products have the recipe's dtype too where the
result is wider (the logits). On a CPU the gradient to the weight, which sums over rows, is written so that XLA has a
fast product for it.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

from pallas_kernels.device import target_platform


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def weight_product(
    x: Float[Array, "*E M in"], weight: Float[Array, "*E out in"], dtype: jnp.dtype, out_dtype: jnp.dtype
) -> Float[Array, "*E M out"]:
    """Returns W x for every row, in `out_dtype`. Operands are rounded to `dtype` and sums are in at least float32.

    With a leading axis E there is a weight for each of E groups of rows. In the gradients' products every operand is in
    `dtype` too; the weight's gradient is rounded only to the dtype in which the weight was given.
    """
    return _product(x.astype(dtype), weight.astype(dtype), (-1, -1), out_dtype)


def _forward(x, weight, dtype, out_dtype):
    return weight_product(x, weight, dtype, out_dtype), (x, weight)


def _backward(dtype, out_dtype, residuals, y_bar):
    x, weight = residuals
    y_bar, rows = y_bar.astype(dtype), x.astype(dtype)
    x_bar = _product(y_bar, weight.astype(dtype), (-1, -2), dtype)
    wide = jnp.promote_types(dtype, jnp.float32)
    if target_platform() != "cpu":
        weight_bar = _product(y_bar, rows, (-2, -2), wide)
    elif y_bar.shape[-1] <= x.shape[-1]:
        weight_bar = lax.optimization_barrier(_product(_transposed(y_bar), rows, (-1, -2), wide))
    else:
        weight_bar = lax.optimization_barrier(_product(_transposed(rows), y_bar, (-1, -2), wide)).mT
    return x_bar.astype(x.dtype), weight_bar.astype(weight.dtype)


weight_product.defvjp(_forward, _backward)


def _transposed(x: Float[Array, "*E M n"]) -> Float[Array, "*E n M"]:
    """Returns the transpose as a copy, whose product is fast: XLA has only a slow product that sums over rows.

    Left to itself it would keep the order in memory, or move the transpose behind the product, and lose it again.
    """
    return with_layout_constraint(x.mT, Layout(tuple(range(x.ndim))))


def _product(
    left: Float[Array, "*E a b"], right: Float[Array, "*E c d"], contracted: tuple[int, int], dtype: jnp.dtype
) -> Float[Array, "*E m n"]:
    """Returns the product over one axis of each, which are counted from the end."""
    batch = tuple(range(left.ndim - 2))
    axes = ((left.ndim + contracted[0],), (right.ndim + contracted[1],))
    return lax.dot_general(left, right, (axes, (batch, batch)), preferred_element_type=dtype)
