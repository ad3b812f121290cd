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
from jax.custom_batching import custom_vmap
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

from pallas_kernels.device import target_platform


def weight_product(
    x: Float[Array, "*E M in"], weight: Float[Array, "*E out in"], dtype: jnp.dtype, out_dtype: jnp.dtype
) -> Float[Array, "*E M out"]:
    """Returns W x for every row, in `out_dtype`. Operands are rounded to `dtype` and sums are in at least float32.

    With a leading axis E there is a weight for each of E groups of rows. In the gradients' products every operand is in
    `dtype` too; the weight's gradient is rounded only to the dtype in which the weight was given.
    """
    return _weight_product(x, weight, dtype, out_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _weight_product(x, weight, dtype, out_dtype):
    return _product(x.astype(dtype), weight.astype(dtype), (-1, -1), out_dtype)


def _forward(x, weight, dtype, out_dtype):
    return _weight_product(x, weight, dtype, out_dtype), (x, weight)


def _backward(dtype, out_dtype, residuals, y_bar):
    x, weight = residuals
    y_bar, rows = y_bar.astype(dtype), x.astype(dtype)
    x_bar = _product(y_bar, weight.astype(dtype), (-1, -2), dtype)
    weight_bar = product_over_rows(y_bar, rows, jnp.promote_types(dtype, jnp.float32))
    return x_bar.astype(x.dtype), weight_bar.astype(weight.dtype)


_weight_product.defvjp(_forward, _backward)


def product_over_rows(
    left: Float[Array, "*E M m"], right: Float[Array, "*E M n"], dtype: jnp.dtype
) -> Float[Array, "*E m n"]:
    """Returns leftᵀ · right of matrices on any leading axes, as the gradients to weights are."""
    if target_platform() != "cpu":
        return _product(left, right, (-2, -2), dtype)
    if left.shape[-1] > right.shape[-1]:  # the narrower one is transposed, and then the small result
        return product_over_rows(right, left, dtype).mT
    return lax.optimization_barrier(_product(_transposed_copy(left), right, (-1, -2), dtype))


@custom_vmap
def _transposed_copy(x: Float[Array, "*E M m"]) -> Float[Array, "*E m M"]:
    """Returns the transpose, its rows one after the other in memory.

    XLA has a slow product that sums over rows. Left to itself it would keep the order in memory, or move a transpose
    behind the product, and choose the slow one again.
    """
    return with_layout_constraint(x.mT, Layout(tuple(range(x.ndim))))


@_transposed_copy.def_vmap
def _transposed_copies(axis_size, in_batched, x):
    return _transposed_copy(x), True


def _product(
    left: Float[Array, "*E a b"], right: Float[Array, "*E c d"], contracted: tuple[int, int], dtype: jnp.dtype
) -> Float[Array, "*E m n"]:
    """Returns the product over one axis of each, which are counted from the end."""
    batch = tuple(range(left.ndim - 2))
    axes = ((left.ndim + contracted[0],), (right.ndim + contracted[1],))
    return lax.dot_general(left, right, (axes, (batch, batch)), preferred_element_type=dtype)
