"""The stored form of a fine-grained FP8 matrix (report, section 3.3.2): e4m3 values and one float32 scale per tile."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Tile = Literal["1x128", "128x128", "128x1"]

# N_C of section 3.3.2: how many products a tensor core adds up before the sum is moved to float32.
PROMOTION_INTERVAL = 128
# How many numbers along a contraction share a scale, and the side of a weight's square block. It is the promotion
# interval, because a sum is multiplied by its scales when it is promoted.
TILE = PROMOTION_INTERVAL

TILE_SHAPE: dict[str, tuple[int, int]] = {"1x128": (1, TILE), "128x128": (TILE, TILE), "128x1": (TILE, 1)}

E4M3 = jnp.float8_e4m3fn
E4M3_MAX = 448.0
# The smallest scale of a tile is the smallest normal float32 number, so that a tile of zeros has a finite scale with a
# finite reciprocal. Any larger bound would round small tiles to zero: gradients shrink with the tokens of the batch
# by which the loss is divided, and at the report's 62.9M tokens the 1e-4 that the released inference kernels allow a
# tile's largest magnitude at least is far above most of them. The report has no bound.
MIN_SCALE = 2.0**-126


@functools.partial(jax.tree_util.register_dataclass, data_fields=("values", "scales"), meta_fields=("tile",))
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A matrix that is `values * scales`, with one scale per tile. A pytree; the tile is static.

    Attributes:
      values: float8_e4m3fn [..., M, K].
      scales: float32, the multiplier that restores the tile (a checkpoint's `weight_scale_inv`):
        [..., M, ceil(K/128)] in "1x128" tiles, [..., ceil(M/128), ceil(K/128)] in "128x128" blocks,
        [..., ceil(M/128), K] in "128x1" tiles.
      tile: rows x columns that share a scale.
    """

    values: Float[Array, "... M K"]
    scales: Float[Array, "..."]
    tile: Tile

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def mT(self) -> Quantized:
        """Returns the transposed matrix, with the same values and scales in transposed tiles."""
        turned: dict[str, Tile] = {"1x128": "128x1", "128x1": "1x128", "128x128": "128x128"}
        return Quantized(self.values.mT, self.scales.mT, turned[self.tile])


def scales_shape(shape: tuple[int, ...], tile: Tile) -> tuple[int, ...]:
    """Returns the shape of the scales of a matrix of `shape`; partial tiles at the edges have a scale too."""
    rows, columns = TILE_SHAPE[tile]
    return (*shape[:-2], -(-shape[-2] // rows), -(-shape[-1] // columns))


def check_tile(tile: str) -> None:
    if tile not in get_args(Tile):
        raise ValueError(f"tile must be one of {', '.join(get_args(Tile))}, not {tile!r}")


def check_quantized(name: str, q: Quantized, ndim: int | None = None) -> None:
    """Raises TypeError or ValueError, naming the argument, unless `q` is whole and of `ndim` dimensions."""
    if not isinstance(q, Quantized):
        raise TypeError(f"{name} must be a Quantized (see pallas_kernels.quantize), not {type(q).__name__}")
    check_tile(q.tile)
    if q.values.dtype != E4M3:
        raise TypeError(f"{name}.values must be float8_e4m3fn, not {q.values.dtype}")
    if q.scales.dtype != jnp.float32:
        raise TypeError(f"{name}.scales must be float32, not {q.scales.dtype}")
    if q.values.ndim < 2 or (ndim is not None and q.values.ndim != ndim):
        raise ValueError(f"{name}.values must have {ndim or 'at least 2'} dimensions, not shape {q.values.shape}")
    wanted = scales_shape(q.values.shape, q.tile)
    if q.scales.shape != wanted:
        raise ValueError(
            f"{name}.scales must have shape {wanted} as values are {q.values.shape} in {q.tile} tiles, "
            f"not {q.scales.shape}"
        )


def not_differentiable[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """Returns `function` with an error for its derivative, which would itself be rounded to e4m3."""
    wrapped = jax.custom_jvp(function)

    @wrapped.defjvp
    def _refuse(primals, tangents):
        raise TypeError(
            "quantized values carry no gradient: give the product one (jax.custom_vjp) or apply lax.stop_gradient first"
        )

    return wrapped
