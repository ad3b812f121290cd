"""How long a jitted function keeps the device busy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

# An H200 has 50 MB of L2: inputs are rotated through several times that, so that each call finds them in HBM.
ROTATED_BYTES = 400_000_000
MAX_SETS = 16


def bytes_of(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def number_of_sets(one_set: Any) -> int:
    """How many sets of inputs to rotate through."""
    return max(2, min(MAX_SETS, -(-ROTATED_BYTES // max(bytes_of(one_set), 1))))


def median_milliseconds(function: Callable[..., Any], sets: Sequence[tuple[Any, ...]], repeats: int) -> float:
    """Median over `repeats` of the mean time of `function`, which is jitted, over the sets of inputs; warm.

    On a GPU the sum of its kernels' run times as CUPTI sees them, without the launches; elsewhere, wall time.
    """

    def over_all(*sets):
        return [function(*inputs) for inputs in sets]

    jax.block_until_ready(over_all(*sets))
    if jax.default_backend() == "gpu":
        from jax.experimental.mosaic.gpu import profiler

        _, times = profiler.measure(over_all, iterations=max(repeats, 2))(*sets)
        if not times:
            raise RuntimeError("CUPTI saw no kernel: is another profiler attached?")
        return statistics.median(times) / len(sets)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(over_all(*sets))
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times) / len(sets)
