"""Computes products of quantised matrices in float64, with numpy."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from cases import normal
from quantise_checks import dequantized, quantized

import pallas_kernels as pk


@functools.cache
def tiles(m: int, k: int, tile: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns values and scales of a random matrix [m, k], quantised by numpy. Its rows have many magnitudes."""
    magnitudes = np.exp2(np.random.default_rng(seed + 100).integers(-3, 4, (m, 1)).astype("f4"))
    return quantized((normal(m, k, seed=seed, dtype="float32") * magnitudes).astype(jnp.bfloat16), tile, False)


@functools.cache
def expert_tiles(groups: int, n: int, k: int, seed: int = 50) -> tuple[np.ndarray, np.ndarray]:
    """Returns values [groups, n, k] and scales of random matrices in 128x128 blocks."""
    pairs = [tiles(n, k, "128x128", seed + group) for group in range(groups)]
    return np.stack([values for values, _ in pairs]), np.stack([scales for _, scales in pairs])


def wide(pair: tuple[np.ndarray, np.ndarray], tile: str) -> np.ndarray:
    """Returns values times scales in float64."""
    values, scales = pair
    if tile == "128x128":
        scales = np.repeat(scales, 128, 0)[: values.shape[0]]
    return dequantized(values, scales)


def of(pair: tuple[jax.Array, jax.Array], tile: str) -> pk.Quantized:
    return pk.Quantized(*pair, tile)  # pyright: ignore[reportArgumentType]
