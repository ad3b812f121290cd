"""Checks that quantised values and scales equal a definition in numpy bit for bit."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from cases import Case, differing, normal, repeated, same_bits

import pallas_kernels as pk
from pallas_kernels.quantize.quantized import E4M3, MIN_SCALE

SIDES = {"1x128": (1, 128), "128x128": (128, 128), "128x1": (128, 1)}


def cases(tiny: bool, dtype: str, powers: bool) -> Iterator[Case]:
    # The first has more tiles than 132 multiprocessors hold at once; 2112 is no multiple of 128; the last fits nothing.
    for m, k in ((200, 160),) if tiny else ((2560, 4096), (1200, 2112), (1000, 333)):
        x = awkward(m, k, dtype)
        for tile in SIDES:
            function = lambda x, tile=tile: [pk.quantize(x, tile=tile, power_of_two_scales=powers)]  # noqa: E731
            yield equal_case(f"{tile}, {m} x {k}", function, (x,), [(x, tile)], powers)
        function = lambda x: pk.quantize_both(x, power_of_two_scales=powers)  # noqa: E731
        yield equal_case(f"both, {m} x {k}", function, (x,), [(x, "1x128"), (x.T, "1x128")], powers)
        values, scales = quantized(np.nan_to_num(x.astype("f4"), posinf=1, neginf=1), "1x128", powers)
        again = dequantized(values, scales).astype("f4").T

        def function(values, scales):
            q = pk.Quantized(values, scales, "1x128")
            return [pk.requantize_transposed(q, power_of_two_scales=powers)]

        name = f"again and transposed, {m} x {k}"
        yield equal_case(name, function, (values, scales), [(again, "1x128")], powers)
    x = awkward(200, 256, dtype)
    function = lambda x: [  # noqa: E731
        pk.Quantized(*(part[i] for part in (q.values, q.scales)), q.tile)
        for q in [pk.quantize(x, tile="128x128", power_of_two_scales=powers)]
        for i in range(3)
    ]
    yield equal_case("128x128, three matrices", function, (np.stack([x] * 3),), [(x, "128x128")] * 3, powers)


def equal_case(
    name: str, function: Callable[..., Any], inputs: tuple, wanted: list[tuple[np.ndarray, str]], powers: bool
) -> Case:
    """Returns a case that compares quantised matrices with the matrices and tiles that they are to represent."""

    def run() -> dict[str, Any]:
        results = repeated(function, inputs)
        wrong_scales = wrong_values = 0
        where = None
        for q, (x, tile) in zip(results[0], wanted, strict=True):
            values, scales = quantized(x, tile, powers)
            got = _without_nan(np.asarray(q.values), spread(scales, tile, x.shape))
            wrong_scales += differing(q.scales, scales)
            unlike = values.view("u1") != got.view("u1")
            wrong_values += int(unlike.sum())
            where = where or first_wrong(q.scales, scales, "scale") or first_wrong(got, values, "value", unlike)
        unequal = sum(not same_bits(results[0], other) for other in results[1:])
        wrong = wrong_scales + wrong_values
        return {
            "passed": not wrong and not unequal, "error": float(wrong), "tolerance": 0, "wrong_scales": wrong_scales,
            "wrong_values": wrong_values, "unequal_runs": unequal, "where": where,
        }  # fmt: skip

    return Case(name, run)


def first_wrong(got: Any, wanted: np.ndarray, what: str, wrong: np.ndarray | None = None) -> str | None:
    """Returns where the first wrong element is, how many rows and columns have one, and both numbers."""
    got, wanted = np.asarray(got).astype("f8"), wanted.astype("f8")
    if got.shape != wanted.shape:
        return f"{what}s of shape {got.shape}, not {wanted.shape}"
    wrong = ~np.isclose(got, wanted, rtol=0, atol=0, equal_nan=True) if wrong is None else wrong
    if not wrong.any():
        return None
    i, j = np.argwhere(wrong)[0]
    count = f"{wrong.any(1).sum()} rows and {wrong.any(0).sum()} columns of {wrong.shape}"
    return f"{what} [{i}, {j}] is {got[i, j]:.9g}, not {wanted[i, j]:.9g}; wrong in {count}"


@functools.cache
def awkward(m: int, k: int, dtype: str) -> np.ndarray:
    """Returns random numbers of many magnitudes with a tile of zeros, one of tiny numbers, an infinity and a NaN."""
    x = normal(m, k, dtype="float32") * np.exp2(np.random.default_rng(1).integers(-12, 12, (m, 1)).astype("f4"))
    x[:128, :128] = 0
    x[130:140, :128] = 1e-36  # a scale below the smallest normal number
    x[m - 3, k - 5], x[m - 30, 3] = np.inf, np.nan
    return x.astype(jnp.dtype(dtype))


def quantized(x: np.ndarray, tile: str, powers: bool) -> tuple[np.ndarray, np.ndarray]:
    """Returns values and scales by the definition in `pallas_kernels/quantize/reference.py`, in numpy.

    Values of a tile without a finite scale, which mean nothing, are zeros.
    """
    rows, columns = SIDES[tile]
    (m, k), x = x.shape, x.astype("f4")
    padded = np.pad(x, ((0, -m % rows), (0, -k % columns)))
    blocks = padded.reshape(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)
    amax = np.abs(blocks).max((1, 3))
    scales = np.maximum(amax * np.float32(1 / 448), np.float32(MIN_SCALE))
    if powers:
        bits = (np.nan_to_num(scales, nan=1, posinf=1).view("i4") + 0x7FFFFF) & 0x7F800000
        scales = bits.view("f4")
    scales = np.where(np.isfinite(amax), scales, np.float32(np.nan))
    with np.errstate(invalid="ignore"):
        scaled = np.clip(blocks * (np.float32(1) / scales)[:, None, :, None], -448, 448)
    values = scaled.astype(E4M3).reshape(padded.shape)[:m, :k]
    return _without_nan(values, spread(scales, tile, (m, k))), scales


def spread(scales: np.ndarray, tile: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the scale of each element."""
    rows, columns = SIDES[tile]
    return np.repeat(np.repeat(scales, rows, 0), columns, 1)[: shape[0], : shape[1]]


def dequantized(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Returns float64 values of a matrix in 1x128 tiles."""
    return values.astype("f8") * np.repeat(scales.astype("f8"), 128, 1)[:, : values.shape[1]]


def _without_nan(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(scales), np.float32(0), values.astype("f4")).astype(E4M3)
