"""Checks the kernels of pallas_kernels on this machine's device against float64 and times them against other libraries.

    python experiments/benchmarks/kernels.py --out results/h200            all problems, at V3's own shapes
    python experiments/benchmarks/kernels.py --only dense --tune           searches the tilings first, stores the best
    python experiments/benchmarks/kernels.py --sanity                      tiny shapes, to check that everything runs

For each problem the inputs are random numbers, and sampled rows of the result are compared with float64 in numpy. The
time is device time (CUPTI) after a warm-up: the median of several passes over inputs larger than the L2 cache. The copy
bandwidth and the bf16 rate are measured in the same run; FP8 is compared with the vendor's dense peak of 1,979 TFLOP/s.
The script prints a table and writes it, with all figures, into kernels.md and kernels.json under --out. It exits with
code 1 if a result is wrong.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import re
import sys
import types
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from device_timing import median_milliseconds, number_of_sets
from grouped_problems import grouped, grouped_weight_gradient, masked
from kernel_problems import OURS, Problem, Search, dense, quantize, weight_gradient
from routing_problems import routing

from pallas_kernels.device import target_platform

FP8_PEAK_TFLOPS = 1979.0
# (K, N) of V3's layers: joint down-projection, q up, kv up, attention out, expert gate and up, expert down.
LAYERS = ((7168, 2112), (1536, 24576), (512, 32768), (16384, 7168), (7168, 4096), (2048, 7168))
FAMILIES = ("dense", "weight gradient", "quantise", "grouped", "grouped weight gradient", "masked", "routing")


def problems(families: list[str], sanity: bool) -> Iterator[Problem]:
    """Yields the problems of the given families, at tiny shapes with `sanity`."""
    layers = ((256, 192), (512, 130)) if sanity else LAYERS
    if "dense" in families:
        for m in (96,) if sanity else (64, 128, 512, 1024, 4096, 8192):
            yield from (dense(m, n, k) for k, n in layers)
    if "weight gradient" in families:
        yield from (weight_gradient(256 if sanity else 4096, n, k) for k, n in layers)
    if "quantise" in families:
        for m, k in ((200, 256),) if sanity else ((4096, 7168), (8192, 2048), (4096, 18432)):
            yield from quantize(m, k)
    experts = layers[:1] if sanity else ((4096, 7168), (7168, 2048))
    loads = [(groups, skewed) for groups in ((4,) if sanity else (8, 32, 256)) for skewed in (False, True)]
    rows = 1024 if sanity else 32768
    if "grouped" in families:
        yield from (grouped(rows, groups, n, k, skewed) for n, k in experts for groups, skewed in loads)
    if "grouped weight gradient" in families:
        yield from (grouped_weight_gradient(rows, groups, n, k, skewed) for n, k in experts for groups, skewed in loads)
    if "masked" in families:
        yield from (masked(4 if sanity else 32, 128, n, k) for n, k in experts)
    if "routing" in families:
        yield from routing(128 if sanity else 8192, 64 if sanity else 7168)


def measure_machine(sanity: bool, repeats: int) -> dict[str, float]:
    """Measures what XLA reaches here: copy bandwidth (bytes read + written, GB/s) and bf16 product rate (TFLOP/s)."""
    count, size = (1 << 20, 256) if sanity else (1 << 28, 8192)
    sets = [(jax.random.normal(jax.random.key(i), (count,), jnp.bfloat16),) for i in range(2)]
    copy = median_milliseconds(jax.jit(lambda x: x + 1), sets, repeats)
    squares = [(jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16),) * 2 for i in range(2)]
    product = median_milliseconds(jax.jit(lambda x, y: x @ y), squares, repeats)
    return {"copy_gb_per_s": 4e-6 * count / copy, "bf16_tflops": 2e-9 * size**3 / product}


def run(problem: Problem, machine: dict[str, float], repeats: int, seed: int) -> dict[str, Any]:
    """Checks and times one problem. If another contender fails, its error message takes the place of its time."""
    first = problem.make(jax.random.key(seed))
    ours = problem.contenders[OURS]
    out = jax.jit(ours.function)(*(first[name] for name in ours.inputs))
    error = problem.error(jax.device_get(first), jax.device_get(out))
    del out
    keys = jax.random.split(jax.random.key(seed + 1), number_of_sets([first[name] for name in ours.inputs]))
    made = [first, *(problem.make(key) for key in keys[1:])]
    times: dict[str, float | str] = {}
    for name, contender in problem.contenders.items():
        sets = [tuple(inputs[argument] for argument in contender.inputs) for inputs in made]
        try:
            times[name] = median_milliseconds(jax.jit(contender.function), sets, repeats)
        except Exception as problem_of_peer:
            if name == OURS:
                raise
            times[name] = f"{type(problem_of_peer).__name__}: {str(problem_of_peer).splitlines()[0][:120]}"
    milliseconds = times[OURS]
    assert isinstance(milliseconds, float)
    row: dict[str, Any] = {"family": problem.family, "problem": problem.name, "milliseconds": times}
    row |= {"error": error, "correct": error <= problem.tolerance}
    if problem.flops:
        row["tflops"] = problem.flops * 1e-9 / milliseconds
        row["fraction_of_fp8_peak"] = row["tflops"] / FP8_PEAK_TFLOPS
    row["gb_per_s"] = problem.bytes * 1e-6 / milliseconds
    row["fraction_of_copy_bandwidth"] = row["gb_per_s"] / machine["copy_gb_per_s"]
    return row


def tune(problem: Problem, search: Search, repeats: int) -> Any:
    """Times every tiling of a kernel and returns the fastest."""
    inputs = problem.make(jax.random.key(0))
    operands = tuple(inputs[name] for name in search.inputs)
    times = {}
    for cut in search.cuts:
        function = jax.jit(functools.partial(search.function, cut))
        times[cut] = median_milliseconds(function, [operands] * 2, repeats)
    return min(times, key=times.__getitem__)


def write_tuning(module: types.ModuleType, found: dict[tuple[Any, ...], Any]) -> None:
    """Writes measured entries into the dictionary TUNED in the source of `module`, keeping its other entries."""
    path = pathlib.Path(str(module.__file__))
    entries = "".join(f"    {key}: {value},\n" for key, value in sorted({**module.TUNED, **found}.items()))
    new, count = re.subn(r"(?m)^(TUNED: .* = )\{[^}]*\}", rf"\g<1>{{\n{entries}}}", path.read_text())
    if count != 1:
        sys.exit(f"{path} has no single declaration of TUNED to replace")
    path.write_text(new)


def table(rows: list[dict[str, Any]], machine: dict[str, float], device: str) -> str:
    """Returns the results as a Markdown table."""
    lines = [
        f"# Kernels on {device}",
        "",
        f"Copy {machine['copy_gb_per_s']:,.0f} GB/s, bf16 product {machine['bf16_tflops']:,.1f} TFLOP/s, both by XLA.",
        "",
        "| | problem | ms | TFLOP/s | of FP8 peak | GB/s | of copy bandwidth | error | others (time / ours) |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        milliseconds = row["milliseconds"]
        peers = "; ".join(
            f"{name} {time / milliseconds[OURS]:.2f}" if isinstance(time, float) else f"{name}: {time}"
            for name, time in milliseconds.items()
            if name != OURS
        )
        flops = f"{row['tflops']:,.1f} | {row['fraction_of_fp8_peak']:.1%}" if "tflops" in row else " | "
        verdict = f"{row['error']:.1e}" + ("" if row["correct"] else " WRONG")
        lines.append(
            f"| {row['family']} | {row['problem']} | {milliseconds[OURS]:.4f} | {flops} | {row['gb_per_s']:,.0f} | "
            f"{row['fraction_of_copy_bandwidth']:.0%} | {verdict} | {peers} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="families of problems")
    parser.add_argument("--sanity", action="store_true", help="tiny shapes")
    parser.add_argument(
        "--tune", action="store_true", help="search the tilings first (Hopper only) and write the best into the source"
    )
    parser.add_argument("--repeats", type=int, default=20, help="timed passes")
    parser.add_argument("--seed", type=int, default=0, help="seed of the inputs")
    parser.add_argument("--out", type=pathlib.Path, help="folder for kernels.md and kernels.json")
    options = parser.parse_args()
    device = jax.devices()[0].device_kind
    if options.tune and target_platform() != "hopper":
        parser.error(f"--tune needs a Hopper GPU, and this machine has a {device}")
    machine = measure_machine(options.sanity, options.repeats)
    rows, found = [], {}
    for problem in problems(options.only, options.sanity):
        if options.tune and (search := problem.search) is not None:
            best = search.module.TUNED[search.key] = tune(problem, search, options.repeats)
            found.setdefault(search.module, {})[search.key] = best
        rows.append(run(problem, machine, options.repeats, options.seed))
        print(table(rows[-1:], machine, device).splitlines()[-1], flush=True)
    for module, entries in found.items():
        write_tuning(module, entries)
    text = table(rows, machine, device)
    print("\n" + text)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        report = {"device": device, "jax": jax.__version__, "machine": machine, "rows": rows}
        (options.out / "kernels.json").write_text(json.dumps(report, indent=1) + "\n")
        (options.out / "kernels.md").write_text(text)
    return 0 if all(row["correct"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
