"""RMSNorm together with the quantization of its output, and its gradient (report section 3.3)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.device import Implementation, choose_implementation, kernel_module
from pallas_kernels.quantize.quantized import TILE, Quantized, not_differentiable
from pallas_kernels.rms_norm.reference import reciprocal_rms

__all__ = ["quantize_rms_norm", "rms_norm_gradient"]

_FLOATS = (jnp.float32, jnp.bfloat16)


@jax.named_scope("quantize_rms_norm")
def quantize_rms_norm(
    x: Float[Array, "M d"],
    weight: Float[Array, " d"],
    *,
    epsilon: float,
    power_of_two_scales: bool = False,
    with_rows: bool = False,
    implementation: Implementation | None = None,
) -> tuple[Quantized, Float[Array, " M"], Float[Array, "M d"] | None]:
    """Returns RMSNorm of `x` in e4m3 in 1x128 tiles, the reciprocal root mean squares, and the normed rows if wanted.

    The norm is computed in float32 and rounded once to the dtype of `x` before it is quantized. The result has the same
    bits as `quantize` of such rows. XLA computes the mean squares, which it can do in the pass that makes `x`; a kernel
    then reads `x` once. Not differentiable: `rms_norm_gradient` is for a product that has a gradient of its own.

    Args:
      x: float32 or bfloat16 [M, d]; d is a multiple of 128.
      weight: float32 or bfloat16 [d].
      epsilon: what is added to the mean squares.
      power_of_two_scales: round the scales up to powers of two.
      with_rows: whether to return the rounded rows too, in the dtype of `x`; None otherwise.

    Raises:
      ValueError, TypeError: shapes or dtypes that do not fit, or an implementation that cannot run here.
    """
    _check_operands(x, weight)
    kernels = kernel_module("rms_norm", choose_implementation(implementation))

    def function(x, weight):
        reciprocal, weight = reciprocal_rms(x, epsilon), weight.astype(jnp.float32)
        tiles, rows = kernels.quantize_scaled(x, reciprocal, weight, power_of_two_scales, with_rows)
        return tiles, reciprocal, rows

    return not_differentiable(function)(x, weight)


@jax.named_scope("rms_norm_gradient")
def rms_norm_gradient(
    x: Float[Array, "M d"],
    weight: Float[Array, " d"],
    reciprocal: Float[Array, " M"],
    gradient: Float[Array, "M d"],
    *,
    plus: Float[Array, "M d"] | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "M d"], Float[Array, " d"]]:
    """Returns the gradients of `x` in its dtype and of `weight` in float32; a kernel reads every array once.

    Args:
      x, weight: the operands of `quantize_rms_norm`.
      reciprocal: float32 [M], the reciprocal root mean squares that it returned.
      gradient: float32 or bfloat16, of the normed rows.
      plus: float32 or bfloat16, what is added to the gradient of `x`, such as what a residual connection brings.

    Raises:
      ValueError, TypeError: shapes or dtypes that do not fit, or an implementation that cannot run here.
    """
    _check_operands(x, weight)
    if reciprocal.shape != x.shape[:1]:
        raise ValueError(f"reciprocal must have shape {x.shape[:1]} as x is {x.shape}, not {reciprocal.shape}")
    for name, array in (("gradient", gradient), ("plus", gradient if plus is None else plus)):
        if array.shape != x.shape:
            raise ValueError(f"{name} must have shape {x.shape} as x has, not {array.shape}")
        if array.dtype not in _FLOATS:
            raise TypeError(f"{name} must be float32 or bfloat16, not {array.dtype}")
    kernels = kernel_module("rms_norm", choose_implementation(implementation))
    return kernels.rms_norm_gradient(x, reciprocal, weight.astype(jnp.float32), gradient, plus)


def _check_operands(x: Array, weight: Array) -> None:
    if x.ndim != 2 or x.shape[1] % TILE:
        raise ValueError(f"x must be [M, d] with d a multiple of {TILE}, not {x.shape}")
    if weight.shape != x.shape[1:]:
        raise ValueError(f"weight must have shape {x.shape[1:]} as x is {x.shape}, not {weight.shape}")
    for name, array in (("x", x), ("weight", weight)):
        if array.dtype not in _FLOATS:
            raise TypeError(f"{name} must be float32 or bfloat16, not {array.dtype}")
