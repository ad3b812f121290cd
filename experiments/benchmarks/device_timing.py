"""Measures how long a jitted function keeps the device busy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

# An H200 has 50 MB of L2 cache. Calls rotate through sets of inputs of several times that size, so that each call reads
# its inputs from HBM.
ROTATED_BYTES = 400_000_000
MAX_SETS = 16


def number_of_sets(one_set: Any) -> int:
    """Returns how many sets of inputs to rotate through."""
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(one_set))
    return max(2, min(MAX_SETS, -(-ROTATED_BYTES // max(size, 1))))


def median_milliseconds(function: Callable[..., Any], sets: Sequence[tuple[Any, ...]], repeats: int) -> float:
    """Returns the milliseconds of one call of a jitted function, after a warm-up.

    This is the median over `repeats` of the mean time over all sets of inputs. On a GPU it is the sum of the run
    times of the kernels as CUPTI reports them, without launch overhead; elsewhere it is wall time.
    """

    def over_all(*sets):
        return [function(*inputs) for inputs in sets]

    jax.block_until_ready(over_all(*sets))
    if jax.default_backend() == "gpu":
        from jax.experimental.mosaic.gpu import profiler

        _, times = profiler.measure(over_all, iterations=max(repeats, 2))(*sets)
        if not times:
            raise RuntimeError("CUPTI reported no kernel; is another profiler attached?")
        return statistics.median(times) / len(sets)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(over_all(*sets))
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times) / len(sets)
