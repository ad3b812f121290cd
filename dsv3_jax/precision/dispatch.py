"""The formats in which tokens are sent to their experts, and gradients of experts' outputs (report section 3.3.3).

Both are FP8 in tiles of the recipe's width whose scales are powers of two. Quantizing the numbers of such tiles gives
the same tiles again, so neither a second hop nor the product on the receiving rank rounds a second time.
"""

from __future__ import annotations

import dataclasses

from jaxtyping import Array, Float

from dsv3_jax.precision.fp8_recipe import Fp8Recipe
from dsv3_jax.precision.tiles import Tiles, quantize


@dataclasses.dataclass(frozen=True)
class DispatchFormat:
    """FP8 rows with one scale per `tile` numbers.

    Attributes:
      tile: numbers that share a scale.
      number_format: "e4m3" or "e5m2".
    """

    tile: int
    number_format: str

    def quantize(self, rows: Float[Array, "M d"]) -> Tiles:
        """Returns values [M, d] in FP8 and float32 scales [M, ceil(d / tile)]."""
        return quantize(rows, (1, self.tile), self.number_format, power_of_two=True)


def dispatch_formats(recipe: Fp8Recipe | None) -> tuple[DispatchFormat | None, DispatchFormat | None]:
    """Returns the formats of tokens and of gradients of the experts' outputs; None stands for the compute dtype.

    The compute dtype is sent where the product that follows has no such tiles: with one scale per tensor, with square
    blocks of gradients, or without FP8 in that product.
    """
    if recipe is None or not recipe.dispatch or not recipe.tile:
        return None, None
    tokens = DispatchFormat(recipe.tile, recipe.forward) if recipe.forward != "none" else None
    rows_of_gradients = recipe.input_gradient != "none" and not recipe.block_wise_gradients
    return tokens, DispatchFormat(recipe.tile, recipe.input_gradient) if rows_of_gradients else None
