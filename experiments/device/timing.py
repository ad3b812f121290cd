"""Measures how long functions take on a device: many queued calls, inputs larger than the cache, several rounds.

Several processes may compile at the same time; one at a time is timed (`device_lock`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from cases import Case, device_lock

# The L2 cache of an H100 has 50 MB, that of an H200 60 MB. Calls rotate through sets of inputs so that each call reads
# its inputs from HBM.
ROTATED_BYTES = 300_000_000
MOST_SETS = 16
MOST_BYTES = 5_000_000_000  # of all inputs and all outputs in memory
QUEUED_BYTES = 15_000_000_000  # of the outputs of calls that are waiting to run
ROUND_SECONDS = 0.04
ROUNDS = 7
SAMPLED = 61  # one of so many rows is checked


@dataclasses.dataclass(frozen=True)
class Contender:
    """One implementation of a problem.

    Attributes:
      function: what is timed.
      inputs: the names of the problem's inputs that it takes.
      reference: when given, an independent computation of rows [::SAMPLED] of the same from the same inputs.
      tolerance: the largest relative error of a row of the result.
      tried: XLA tries several programs for it on the device while it compiles.
    """

    function: Callable[..., Any]
    inputs: tuple[str, ...]
    reference: Callable[..., Any] | None = None
    tolerance: float = 0.0
    tried: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """What several implementations compute from the same inputs.

    Attributes:
      name: the operation and its sizes.
      make: maps a random key to named inputs.
      contenders: implementations by name.
      flops: floating-point operations; 0 where memory traffic is the limit.
      bytes: the fewest bytes that must be read and written.
      published: TFLOP/s that DeepGEMM's authors published for this problem on an H800.
    """

    name: str
    make: Callable[[jax.Array], dict[str, Any]]
    contenders: dict[str, Contender]
    flops: float = 0.0
    bytes: float = 0.0
    published: float = 0.0


def timed_cases(problem: Problem) -> Iterator[Case]:
    """Yields one case per contender, which times it and, where there is a reference, checks the result."""
    make = problem.make if interpreted() else jax.jit(problem.make)
    inputs = functools.cache(lambda i: make(jax.random.key(i)))
    for name, contender in problem.contenders.items():
        yield Case(f"{problem.name}: {name}", functools.partial(time_contender, problem, contender, inputs))


def time_contender(problem: Problem, contender: Contender, inputs: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
    """Returns what a case reports: milliseconds, their spread, rates, and the error."""
    with device_lock(shared=True):
        first = tuple(inputs(0)[name] for name in contender.inputs)
        one = nbytes(first) + nbytes(jax.eval_shape(contender.function, *first))
        count = max(2, min(MOST_SETS, math.ceil(ROTATED_BYTES / one), int(MOST_BYTES // one)))
        sets = [tuple(inputs(i)[name] for name in contender.inputs) for i in range(1 if interpreted() else count)]
        jax.block_until_ready(sets)
    program = compiled(contender.function, sets, contender.tried)
    check = compiled_check(contender, program, sets) if contender.reference else None
    outcome: dict[str, Any] = {"passed": True}
    with device_lock():
        if check is not None:
            error = float(check(program(sets)[0], first))
            outcome |= {"passed": error <= contender.tolerance, "error": error, "tolerance": contender.tolerance}
        outcome |= milliseconds(program, sets)
        copy = copy_bandwidth() if problem.bytes and not problem.flops else 0.0
    if problem.flops:
        outcome["tflops"] = problem.flops * 1e-9 / outcome["ms"]
    if problem.bytes:
        outcome["gb_s"] = problem.bytes * 1e-6 / outcome["ms"]
    if copy:
        outcome["of_copy"] = outcome["gb_s"] / copy
    if problem.published:
        outcome["published"] = problem.published
    return outcome


def compiled(function: Callable[..., Any], sets: list[tuple[Any, ...]], tried: bool = False) -> Callable[..., Any]:
    """Returns a compiled program that runs `function` on each of the sets; interpreted kernels stay uncompiled."""

    def program(sets):
        return [function(*inputs) for inputs in sets]

    if interpreted():
        return program
    with device_lock(shared=True) if tried else contextlib.nullcontext():
        return jax.jit(program).lower(sets).compile()


def compiled_check(contender: Contender, program: Callable[..., Any], sets: list[tuple[Any, ...]]) -> Any:
    """Returns the compiled function from a result and its inputs to the largest relative error of a row."""

    def check(got, inputs):
        assert contender.reference is not None
        return largest_row_error(jax.tree.map(lambda x: x[::SAMPLED], got), contender.reference(*inputs))

    if interpreted():
        return check
    got = jax.eval_shape(contender.function, *sets[0])
    with device_lock(shared=True):
        return jax.jit(check).lower(got, sets[0]).compile()


def milliseconds(program: Callable[..., Any], sets: list[tuple[Any, ...]]) -> dict[str, float]:
    """Returns the median over rounds of the time of one call, and (largest - smallest) / median.

    A round is many calls of `program`, which computes on all sets. Only ends of queues are waited for, so that the
    host's work is hidden behind the device's.
    """
    if interpreted():
        start = time.perf_counter()
        jax.block_until_ready(program(sets))
        return {"ms": (time.perf_counter() - start) * 1e3 / len(sets), "spread": 0.0}
    queue = max(1, int(QUEUED_BYTES // max(nbytes(jax.block_until_ready(program(sets))), 1)))
    start = time.perf_counter()
    jax.block_until_ready(program(sets))
    calls = max(math.ceil(20 / len(sets)), math.ceil(ROUND_SECONDS / (time.perf_counter() - start)))
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for call in range(1, calls + 1):
            last = program(sets)
            if call % queue == 0 or call == calls:
                jax.block_until_ready(last)
        times.append((time.perf_counter() - start) * 1e3 / calls / len(sets))
    median = statistics.median(times)
    return {"ms": median, "spread": (max(times) - min(times)) / median}


@functools.cache
def copy_bandwidth() -> float:
    """Returns what a copy on the device moves, in GB/s, counting bytes read and bytes written."""
    count = 1 << (16 if interpreted() else 28)
    sets = [(jnp.full((count,), i, jnp.bfloat16),) for i in range(2)]
    return 4e-6 * count / milliseconds(compiled(lambda x: x + 1, sets), sets)["ms"]


def largest_row_error(got: Any, wanted: Any) -> jax.Array:
    """Returns the largest relative error of a row of any array of the result; NaN where one is."""
    worst = jnp.zeros(())
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        size = jnp.linalg.norm(b, axis=-1)
        worst = jnp.maximum(worst, jnp.max(jnp.linalg.norm(a - b, axis=-1) / jnp.where(size > 0, size, 1)))
    return worst


def interpreted() -> bool:
    return jax.default_backend() != "gpu"


def nbytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
