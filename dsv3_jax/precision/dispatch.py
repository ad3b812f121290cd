"""What tokens, and the gradients of what comes back for them, are while they travel to experts (report section 3.3.3).

Tiles of a recipe's width in FP8, with scales that are powers of two: quantising what such tiles stand for gives the
same numbers again, so that nothing is lost by a second hop, nor where the product at the end quantises its input.
"""

from __future__ import annotations

import dataclasses

from jaxtyping import Array, Float

from dsv3_jax.precision.fp8_recipe import Fp8Recipe
from dsv3_jax.precision.tiles import Tiles, quantize


@dataclasses.dataclass(frozen=True)
class TravelFormat:
    """FP8 rows with a scale every `tile` numbers.

    Attributes:
      tile: numbers that share a scale.
      number_format: "e4m3" or "e5m2".
    """

    tile: int
    number_format: str

    def quantize(self, rows: Float[Array, "M d"]) -> Tiles:
        """Values [M, d] in FP8 and float32 scales [M, ceil(d / tile)]."""
        return quantize(rows, (1, self.tile), self.number_format, power_of_two=True)


def travel_formats(recipe: Fp8Recipe | None) -> tuple[TravelFormat | None, TravelFormat | None]:
    """Of tokens, and of the gradients of the experts' outputs; None is the dtype of the computation.

    That is what travels where the product behind it has no such tiles either: a scale a tensor, square blocks of
    gradients, or no FP8 in that product.
    """
    if recipe is None or not recipe.dispatch or not recipe.tile:
        return None, None
    tokens = TravelFormat(recipe.tile, recipe.forward) if recipe.forward != "none" else None
    rows_of_gradients = recipe.input_gradient != "none" and not recipe.block_wise_gradients
    return tokens, TravelFormat(recipe.tile, recipe.input_gradient) if rows_of_gradients else None
