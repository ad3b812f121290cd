"""SwiGLU together with the quantization around it, forward and backward (report sections 2.1.2 and 3.3.3)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.device import Implementation, choose_implementation, kernel_module
from pallas_kernels.quantize.quantized import TILE, Quantized, check_quantized, not_differentiable

__all__ = ["quantize_swiglu", "swiglu_gradient"]


@jax.named_scope("quantize_swiglu")
def quantize_swiglu(
    gate_up: Float[Array, "M 2*W"],
    *,
    power_of_two_scales: bool = False,
    implementation: Implementation | None = None,
) -> tuple[Quantized, Quantized]:
    """Returns silu(gate) * up in e4m3, and `gate_up` itself in e4m3, reading it once; both in 1x128 tiles.

    SwiGLU is computed in float32 and rounded once to the dtype of `gate_up` before it is quantized. The result has the
    same bits as `quantize` of such an activation. Not differentiable.

    Args:
      gate_up: float32 or bfloat16 [M, 2 W], the gates and then the factors of each row; W is a multiple of 128.
      power_of_two_scales: round the scales of the activation up to powers of two; those of `gate_up` never are.

    Raises:
      ValueError, TypeError: shapes or dtypes that do not fit, or an implementation that cannot run here.
    """
    if gate_up.ndim != 2 or gate_up.shape[1] % (2 * TILE):
        raise ValueError(f"gate_up must be [M, 2 W] with W a multiple of {TILE}, not {gate_up.shape}")
    if gate_up.dtype not in (jnp.float32, jnp.bfloat16):
        raise TypeError(f"gate_up must be float32 or bfloat16, not {gate_up.dtype}")
    kernels = kernel_module("swiglu", choose_implementation(implementation))
    return not_differentiable(lambda x: kernels.quantize_swiglu(x, power_of_two_scales))(gate_up)


@jax.named_scope("swiglu_gradient")
def swiglu_gradient(
    gate_up: Quantized,
    gradient: Float[Array, "M W"],
    *,
    power_of_two_scales: bool = False,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "M 2*W"], Quantized]:
    """Returns the gradient of `gate_up` in the dtype of `gradient`, and the transposed activation [W, M] in e4m3.

    The activation is computed again from `gate_up` and rounded as in `quantize_swiglu`. Its 1x128 tiles run over 128
    rows of `gate_up`, as the weight gradient of the map behind SwiGLU contracts them.

    Args:
      gate_up: what `quantize_swiglu` returned of its operand.
      gradient: float32 or bfloat16, of silu(gate) * up.
      power_of_two_scales: round the scales of the activation up to powers of two.

    Raises:
      ValueError, TypeError: shapes or dtypes that do not fit, or an implementation that cannot run here.
    """
    check_quantized("gate_up", gate_up, ndim=2)
    if gate_up.tile != "1x128":
        raise ValueError(f"gate_up must be in 1x128 tiles, not {gate_up.tile}")
    if gate_up.shape[1] % (2 * TILE):
        raise ValueError(f"gate_up must be [M, 2 W] with W a multiple of {TILE}, not {gate_up.shape}")
    wanted = (gate_up.shape[0], gate_up.shape[1] // 2)
    if gradient.shape != wanted:
        raise ValueError(f"gradient must have shape {wanted} as gate_up is {gate_up.shape}, not {gradient.shape}")
    if gradient.dtype not in (jnp.float32, jnp.bfloat16):
        raise TypeError(f"gradient must be float32 or bfloat16, not {gradient.dtype}")
    kernels = kernel_module("swiglu", choose_implementation(implementation))
    return kernels.swiglu_gradient(gate_up, gradient, power_of_two_scales)
