"""The settings of the FP8 recipe of section 3.3: each decision of the report is a field that can be changed alone."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

from dsv3_jax.errors import ConfigError
from pallas_kernels import TILE

OperandFormat = Literal["e4m3", "none"]
GradientFormat = Literal["e4m3", "e5m2", "none"]
AttentionCache = Literal["e5m6", "e4m3", "none"]
TILES = (0, 16, 32, 64, TILE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fp8Recipe:
    """Says how the linear maps of a model are computed and what they keep for the backward pass.

    A product whose tiles are 128 wide, in e4m3 and promoted, is computed by `pallas_kernels` (by a kernel where the
    device has one). Every other choice is emulated in float32 on any device.

    Attributes:
      forward: format of both operands of Y = X Wᵀ; "none" leaves this product to the compute dtype.
      input_gradient: format of dY in dX = dY W (W is e4m3); "none" leaves it to the compute dtype.
      weight_gradient: format of dY in dW = dYᵀ X (X is e4m3); "none" leaves it to the compute dtype.
      tile: how many numbers along the contraction share a scale, and the side of a weight's square blocks: 128 in
        the report, 16, 32 or 64, or 0 for one scale per tensor.
      promotion: sums move from the tensor core to float32 after every 128 products; without it an accumulator of 14
        bits, as Hopper's, holds the whole sum. On a CPU promoted sums are exact to float32's rounding, where a tensor
        core's 14 bits within 128 products would leave errors of about 3e-4.
      block_wise_gradients: quantize dY of the input gradient in square blocks, as weights are (appendix B.2: a
        16B model diverged with it).
      power_of_two_scales: round the scales of all activations and gradients up to powers of two, not only of those
        that the report names.
      cache_activations: keep inputs of linear maps in FP8; False keeps them in the compute dtype.
      after_attention: what is kept of the attention's output, the next linear map's input: "e5m6" (12 bits, scales
        that are powers of two), "e4m3" or "none" (the compute dtype).
      cache_swiglu_input: keep the input of SwiGLU in FP8 and recompute its output; False keeps both as they are. It
        holds for dense layers too, whereas the report speaks of MoE layers only.
      dispatch: send tokens to the experts, and gradients to their down-projections, in FP8 with scales that are
        powers of two. On one device nothing is sent, but the scales are the same.
    """

    forward: OperandFormat = "e4m3"
    input_gradient: GradientFormat = "e4m3"
    weight_gradient: GradientFormat = "e4m3"
    tile: int = TILE
    promotion: bool = True
    block_wise_gradients: bool = False
    power_of_two_scales: bool = False
    cache_activations: bool = True
    after_attention: AttentionCache = "e5m6"
    cache_swiglu_input: bool = True
    dispatch: bool = True

    def __post_init__(self) -> None:
        allowed: dict[str, tuple[Any, ...]] = {
            "forward": get_args(OperandFormat),
            "input_gradient": get_args(GradientFormat),
            "weight_gradient": get_args(GradientFormat),
            "after_attention": get_args(AttentionCache),
            "tile": TILES,
        }
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            choices = allowed.get(field.name, (True, False))
            if value not in choices or isinstance(value, bool) is (field.name in allowed):
                raise ConfigError(
                    f"precision.fp8.{field.name} must be one of {', '.join(map(str, choices))}, not {value!r}"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Role:
    """Says what precedes and follows a linear map in the model, where the recipe depends on it.

    Attributes:
      after_attention: its input is the attention's output.
      swiglu: its input is SwiGLU of the array it is given.
      dispatched: its input was dispatched to an expert.
      gradient_dispatched: the gradient of its output was dispatched to an expert.
    """

    after_attention: bool = False
    swiglu: bool = False
    dispatched: bool = False
    gradient_dispatched: bool = False
