"""Defines what a check consists of: cases, their outcomes, and the comparisons that they share.

A module of checks has a generator function that yields `Case`s; `plan.py` lists these functions. `worker.py` runs the
cases of one check in a process of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Largest relative errors of a row or column in the Frobenius norm. Rounding to bfloat16 gives 1.7e-3 and truncating to
# it 3.3e-3. A tensor core aligns FP8 products to the largest and keeps about 14 bits: some 4e-4 in random sums.
# Products of bfloat16 are exact in float32, of which a sum of a few thousand loses 2e-6 to 1e-5.
BFLOAT16 = 2.4e-3
FP8_SUM = 1e-3
FLOAT32_SUM = 3e-5
RUNS = 5  # runs on the same inputs that must agree bit for bit


# Called with what a case does next ("waiting" for the device, "alone" on it, or "free" again), or "note" and numbers.
listeners: list[Callable[..., None]] = []


@dataclasses.dataclass(frozen=True)
class Case:
    """One comparison or measurement, which fails or hangs alone.

    Attributes:
      name: what is run, unique within its check.
      run: computes and returns numbers for the report. It must return "passed"; an exception fails the case as well.
    """

    name: str
    run: Callable[[], dict[str, Any]]


def error_case(
    name: str,
    function: Callable[..., Any],
    inputs: tuple,
    wanted: Callable[[], Any],
    tolerance: Any,
) -> Case:
    """Returns a case that runs `function` several times and compares every row and column with float64.

    Args:
      function: maps arrays to a tree of arrays. It is compiled, unless kernels are interpreted.
      inputs: arguments on the host.
      wanted: returns the same tree in numpy.
      tolerance: the largest `row_error` of all leaves, or a tree with one for each. 0 asks for equal bits.
    """

    def run() -> dict[str, Any]:
        results = repeated(function, inputs)
        expected = jax.tree.leaves(wanted())
        got = jax.tree.leaves(results[0])
        limits = jax.tree.leaves(tolerance) if not isinstance(tolerance, float | int) else [tolerance] * len(got)
        errors = [
            float(differing(g, w)) if limit == 0 else row_error(g, w)
            for g, w, limit in zip(got, expected, limits, strict=True)
        ]
        worst = max(range(len(got)), key=lambda i: _ratio(errors[i], limits[i]))
        unequal = sum(not same_bits(results[0], other) for other in results[1:])
        passed = all(error <= limit for error, limit in zip(errors, limits, strict=True)) and not unequal
        outcome = {"passed": passed, "error": errors[worst], "tolerance": limits[worst], "unequal_runs": unequal}
        return outcome if passed else outcome | {"where": where_wrong(got[worst], expected[worst], worst)}

    return Case(name, run)


def repeated(function: Callable[..., Any], inputs: tuple) -> list[Any]:
    """Returns the results of several runs, on the host. Memory that outputs may get is filled with NaN before each."""
    interpreted = jax.default_backend() != "gpu"
    compiled = function if interpreted else jax.jit(function)
    operands = jax.device_put(inputs)
    results = []
    for _ in range(2 if interpreted else RUNS):
        if results:
            jax.block_until_ready([jnp.full(x.shape, jnp.nan).astype(x.dtype) for x in jax.tree.leaves(results[0])])
        results.append(jax.device_get(compiled(*operands)))
    return results


def row_error(got: Any, wanted: Any) -> float:
    """Returns the largest relative error in the Frobenius norm of a row or column of any matrix; infinity for NaN.

    The error of a row is divided by 1 + 2 / sqrt(n), since the errors of few elements average less; n is the number of
    elements, counted as the fourth moment counts them where some are much larger than others.
    Rows that should be zero must be zero; their error is relative to 1.
    """
    got, wanted = np.asarray(got, "f8"), np.asarray(wanted, "f8")
    if got.shape != wanted.shape or not np.isfinite(got).all():
        return float("inf")
    got, wanted = (x.reshape(-1, *x.shape[-2:]) if x.ndim > 1 else x.reshape(1, 1, -1) for x in (got, wanted))
    worst = 0.0
    for axis in (1, 2):
        if wanted.shape[3 - axis] == 1 or not got.size:
            continue  # every element would be a row of its own
        error, size = np.linalg.norm(got - wanted, axis=3 - axis), np.linalg.norm(wanted, axis=3 - axis)
        squares = wanted * wanted
        # A row of few elements may nearly vanish by chance: its error is relative to an average row then.
        average = np.sqrt(squares.sum((1, 2), keepdims=True)[..., 0] / wanted.shape[axis])
        alike = squares.sum(3 - axis) ** 2 / np.maximum((squares * squares).sum(3 - axis), 1e-300)
        size = np.where((alike < 16) & (size > 0), np.maximum(size, 0.5 * average), size)
        few = 1 + 2 / np.sqrt(np.maximum(alike, 1))
        worst = max(worst, float(np.max(error / np.where(size > 0, size, 1) / few)))
    return worst


def where_wrong(got: Any, wanted: Any, leaf: int) -> str:
    """Returns where the largest error is, how large the numbers are there, and how many elements are not finite."""
    got, wanted = np.asarray(got, "f8"), np.asarray(wanted, "f8")
    if got.shape != wanted.shape:
        return f"leaf {leaf} has shape {got.shape}, not {wanted.shape}"
    error = np.where(np.isfinite(got), np.abs(got - wanted), np.inf)
    at = np.unravel_index(np.argmax(error), error.shape)
    large = error > 0.02 * np.sqrt(np.mean(wanted * wanted))
    places = [f"{len(np.unique(i))} of {n}" for i, n in zip(np.nonzero(large), got.shape, strict=True)]
    return (
        f"leaf {leaf} {tuple(map(int, at))} is {got[at]:.6g}, not {wanted[at]:.6g}; large errors at {int(large.sum())} "
        f"elements, in each dimension at {', '.join(places)}; {int((~np.isfinite(got)).sum())} not finite"
    )


def differing(got: Any, wanted: Any) -> int:
    """Returns how many elements differ in their bits (all NaN are equal); of arrays of other shapes all do."""
    got, wanted = np.asarray(got), np.asarray(wanted)
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return max(got.size, 1)
    unequal = _bits(got) != _bits(wanted)
    if got.dtype.kind in "fV":
        unequal &= ~(np.isnan(got.astype("f4")) & np.isnan(wanted.astype("f4")))
    return int(unequal.sum())


def same_bits(a: Any, b: Any) -> bool:
    return all(np.array_equal(_bits(x), _bits(y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def _bits(x: Any) -> np.ndarray:
    x = np.ascontiguousarray(x)
    return x.view(f"u{x.dtype.itemsize}")


def _ratio(error: float, limit: float) -> float:
    return error / limit if limit else error * 1e9


@contextlib.contextmanager
def device_lock(shared: bool = False) -> Iterator[None]:
    """Keeps other processes off the device; `shared`: only those that measure.

    The parent names the locked file; the lock ends with the process that holds it.
    """
    path = os.environ.get("DEVICE_LOCK")
    if path is None:
        yield
        return
    with open(path) as file:
        _tell("waiting")
        fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        _tell("alone")
        yield
    _tell("free")


def note(**numbers: Any) -> None:
    """Has numbers written at once, so that a case that is stopped later still says how far it came."""
    _tell("note", **numbers)


def _tell(what: str, **numbers: Any) -> None:
    for listener in listeners:
        listener(what, **numbers)


@functools.cache
def normal(*shape: int, seed: int = 0, dtype: str = "bfloat16") -> np.ndarray:
    """Returns random normal numbers."""
    return np.random.default_rng(seed).standard_normal(shape, "f4").astype(jnp.dtype(dtype))
