"""Checks quantisation: every byte and scale equals a definition in numpy."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from cases import Case, error_case, normal

import pallas_kernels as pk
from pallas_kernels.quantize.quantized import E4M3, MIN_SCALE

SIDES = {"1x128": (1, 128), "128x128": (128, 128), "128x1": (128, 1)}


def cases(tiny: bool, dtype: str, powers: bool) -> Iterator[Case]:
    # The first has more tiles than 132 multiprocessors hold at once; 2112 is no multiple of 128; the last fits nothing.
    for m, k in ((200, 160),) if tiny else ((2560, 4096), (1200, 2112), (1000, 333)):
        x = awkward(m, k, dtype)
        for tile in SIDES:
            yield equal_case(
                f"{tile}, {m} x {k}",
                lambda x, tile=tile: _pair(pk.quantize(x, tile=tile, power_of_two_scales=powers), tile),
                (x,),
                functools.partial(quantized, x, tile, powers),
            )
        yield equal_case(
            f"both, {m} x {k}",
            lambda x: [_pair(q, "1x128") for q in pk.quantize_both(x, power_of_two_scales=powers)],
            (x,),
            functools.partial(quantized_both, x, powers),
        )
        values, scales = quantized(np.nan_to_num(x.astype("f4"), posinf=1, neginf=1), "1x128", powers)
        yield equal_case(
            f"again and transposed, {m} x {k}",
            lambda values, scales: _pair(
                pk.requantize_transposed(pk.Quantized(values, scales, "1x128"), power_of_two_scales=powers), "1x128"
            ),
            (values, scales),
            functools.partial(quantized_again, values, scales, powers),
        )
    yield equal_case(
        "128x128, three matrices",
        lambda x: _pair(pk.quantize(x, tile="128x128", power_of_two_scales=powers), "128x128"),
        (np.stack([awkward(200, 256, dtype)] * 3),),
        lambda: [np.stack([part] * 3) for part in quantized(awkward(200, 256, dtype), "128x128", powers)],
    )


def equal_case(name: str, function: Callable[..., Any], inputs: tuple, wanted: Callable[..., Any]) -> Case:
    return error_case(name, function, inputs, wanted, 0)


@functools.cache
def awkward(m: int, k: int, dtype: str) -> np.ndarray:
    """Returns random numbers of many magnitudes with a tile of zeros, one of tiny numbers, an infinity and a NaN."""
    x = normal(m, k, dtype="float32") * np.exp2(np.random.default_rng(1).integers(-12, 12, (m, 1)).astype("f4"))
    x[:128, :128] = 0
    x[130:140, :128] = 1e-36  # a scale below the smallest normal number
    x[m - 3, k - 5], x[m - 30, 3] = np.inf, np.nan
    return x.astype(jnp.dtype(dtype))


def quantized(x: np.ndarray, tile: str, powers: bool) -> tuple[np.ndarray, np.ndarray]:
    """Returns values and scales by the definition in `pallas_kernels/quantize/reference.py`, in numpy."""
    rows, columns = SIDES[tile]
    (m, k), x = x.shape, x.astype("f4")
    padded = np.pad(x, ((0, -m % rows), (0, -k % columns)))
    blocks = padded.reshape(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)
    amax = np.abs(blocks).max((1, 3))
    scales = amax * (np.float32(1) / np.float32(448))
    scales = np.maximum(scales, np.float32(MIN_SCALE))
    if powers:
        bits = (np.nan_to_num(scales, nan=1, posinf=1).view("i4") + 0x7FFFFF) & 0x7F800000
        scales = bits.view("f4")
    scales = np.where(np.isfinite(amax), scales, np.float32(np.nan))
    with np.errstate(invalid="ignore"):
        scaled = np.clip(blocks * (np.float32(1) / scales)[:, None, :, None], -448, 448)
    values = scaled.astype(E4M3).reshape(padded.shape)[:m, :k]
    return _without_nan(values, np.repeat(np.repeat(scales, rows, 0), columns, 1)[:m, :k]), scales


def dequantized(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Returns float64 values of a matrix in 1x128 tiles."""
    return values.astype("f8") * np.repeat(scales.astype("f8"), 128, 1)[:, : values.shape[1]]


def quantized_both(x: np.ndarray, powers: bool):
    return quantized(x, "1x128", powers), turned(quantized(x, "128x1", powers))


def quantized_again(values: np.ndarray, scales: np.ndarray, powers: bool):
    return turned(quantized(dequantized(values, scales).astype("f4"), "128x1", powers))


def turned(pair: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return pair[0].T, pair[1].T


def _pair(q: pk.Quantized, tile: str):
    """Returns values and scales, with the values of a tile that has no finite scale, which mean nothing, as zeros."""
    rows, columns = SIDES[tile]
    spread = jnp.repeat(jnp.repeat(q.scales, rows, -2), columns, -1)[..., : q.shape[-2], : q.shape[-1]]
    return jnp.where(jnp.isnan(spread), 0, q.values.astype(jnp.float32)).astype(E4M3), q.scales


def _without_nan(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(scales), np.float32(0), values.astype("f4")).astype(E4M3)
