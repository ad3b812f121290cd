"""RMSNorm in front of linear maps in FP8: the norm's output is quantized in the pass that computes it.

The maps behind a norm all multiply by the same FP8 tiles, and keep the same ones for the backward pass. The normed rows
themselves are written only where something else reads them too.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

import pallas_kernels as pk
from dsv3_jax.precision.fp8_recipe import Fp8Recipe
from dsv3_jax.precision.prepared import QuantizedRows
from pallas_kernels import TILE


class RunOnTokens(Protocol):
    """Returns function(*tokens, *whole), arrays by token and partial sums; it may be called with a shard of the tokens.

    Partial sums have a first axis, along which those of several calls are stacked.
    """

    def __call__(
        self, function: Callable[..., tuple[Any, Any]], tokens: tuple[Array, ...], whole: tuple[Array, ...]
    ) -> tuple[Any, Any]: ...


def quantizes_norms(recipe: Fp8Recipe, width: int) -> bool:
    """Returns whether linear maps multiply by the report's tiles of a norm's output, and keep nothing else of it."""
    report = recipe.tile == TILE and recipe.forward == "e4m3" and recipe.cache_activations
    return report and width % TILE == 0


def normed_rows(
    x: Float[Array, "*batch d"],
    weight: Float[Array, " d"],
    epsilon: float,
    *,
    power_of_two_scales: bool,
    with_rows: bool,
    with_input: bool,
    run: RunOnTokens,
) -> tuple[QuantizedRows, Float[Array, "*batch d"] | None]:
    """Returns w * x / sqrt(mean(x^2) + epsilon) in FP8; the result has the bits of the two operations one by one.

    Args:
      power_of_two_scales: round the scales up to powers of two.
      with_rows: whether anything but linear maps in FP8 reads the rows.
      with_input: whether to return `x` too, for a residual connection to read. Its gradient is then added in the pass
        that computes the norm's.
      run: what computes on the devices of the tokens.
    """
    settings = _Settings(epsilon, power_of_two_scales, with_rows, with_input, run)
    both: tuple[QuantizedRows, Array | None] = _normed(x, weight, settings)
    normed, x_again = both
    return dataclasses.replace(normed, tiles=lax.stop_gradient(normed.tiles)), x_again


@dataclasses.dataclass(frozen=True)
class _Settings:
    """The arguments of `normed_rows` that are no arrays."""

    epsilon: float
    power_of_two_scales: bool
    with_rows: bool
    with_input: bool
    run: RunOnTokens


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _normed(x: Array, weight: Array, settings: _Settings) -> Any:
    return _forward(x, weight, settings)[0]


def _forward(x: Array, weight: Array, settings: _Settings) -> tuple[tuple[QuantizedRows, Array | None], Any]:
    def quantized(x: Array, weight: Array) -> tuple[Any, tuple[()]]:
        results = pk.quantize_rms_norm(
            _flat(x),
            weight,
            epsilon=settings.epsilon,
            power_of_two_scales=settings.power_of_two_scales,
            with_rows=settings.with_rows,
        )
        return jax.tree.map(lambda part: part.reshape(*x.shape[:-1], *part.shape[1:]), results), ()

    (tiles, reciprocal, rows), _ = settings.run(quantized, (x,), (weight,))
    normed = QuantizedRows(tiles, rows if settings.with_rows else jnp.zeros(x.shape, x.dtype))
    return (normed, x if settings.with_input else None), (x, weight, reciprocal)


def _backward(settings: _Settings, residuals: Any, bars: tuple[QuantizedRows, Array | None]) -> tuple[Array, Array]:
    (x, weight, reciprocal), (bar, plus) = residuals, bars

    def gradient(x: Array, reciprocal: Array, bar: Array, *others: Array) -> tuple[Array, Array]:
        *plus, weight = others
        x_bar, weight_bar = pk.rms_norm_gradient(
            _flat(x), weight, reciprocal.reshape(-1), _flat(bar), plus=_flat(plus[0]) if plus else None
        )
        return x_bar.reshape(x.shape), weight_bar[None]

    x_bar, weight_bars = settings.run(gradient, (x, reciprocal, bar.rows, *([] if plus is None else [plus])), (weight,))
    return x_bar, jnp.sum(weight_bars, axis=0).astype(weight.dtype)


_normed.defvjp(_forward, _backward)


def _flat(x: Float[Array, "*batch d"]) -> Float[Array, "M d"]:
    return x.reshape(-1, x.shape[-1])
