"""Bytes a number takes in the places a precision recipe keeps it (report sections 3.3.1 to 3.3.3)."""

from __future__ import annotations

import dataclasses

from dsv3_jax.errors import ConfigError

_TILE = 4 / 128  # a float32 scale a tile of 128
_WIDTHS = {"float32": 4, "bfloat16": 2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Formats:
    """Bytes a number.

    Attributes:
      compute: activations and operands of products that are not FP8.
      weight: a linear map's weight as its products read it.
      linear_input: what is kept of a linear map's input, FP8 tiles with their scales in the FP8 recipe.
      attention_output: what is kept of the input of the map behind attention (E5M6 in the FP8 recipe).
      swiglu_input: what is kept of SwiGLU's input.
      dispatch: of tokens on their way to experts, and of the gradients of what comes back.
      combine: of what comes back, and of the tokens' gradients.
      moment: of each of Adam's moments, unless the plan names another.
    """

    compute: float
    weight: float
    linear_input: float
    attention_output: float
    swiglu_input: float
    dispatch: float
    combine: float
    moment: float

    @property
    def is_fp8(self) -> bool:
        return self.weight < 2


_RECIPES = {
    **{
        name: Formats(
            compute=width,
            weight=width,
            linear_input=width,
            attention_output=width,
            swiglu_input=width,
            dispatch=width,
            combine=width,
            moment=4,
        )
        for name, width in _WIDTHS.items()
    },
    "fp8": Formats(
        compute=2,
        weight=1 + 4 / 128**2,
        linear_input=1 + _TILE,
        attention_output=1.5 + _TILE,
        swiglu_input=1 + _TILE,
        dispatch=1 + _TILE,
        combine=2,
        moment=2,
    ),
}

RECIPES = tuple(_RECIPES)


def formats_of(precision: str) -> Formats:
    """The widths of a recipe: float32, bfloat16 or fp8.

    Raises:
      ConfigError: there is no such recipe.
    """
    if precision not in _RECIPES:
        raise ConfigError(f"precision must be one of {', '.join(RECIPES)} in a plan, not '{precision}'")
    return _RECIPES[precision]


def width_of(dtype: str) -> int:
    """Bytes of a number of `dtype`: float32 or bfloat16."""
    if dtype not in _WIDTHS:
        raise ConfigError(f"a dtype in a plan is float32 or bfloat16, not '{dtype}'")
    return _WIDTHS[dtype]
