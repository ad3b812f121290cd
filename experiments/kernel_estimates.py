"""Where the Hopper kernels should land on an H200, by counting cycles. Not a measurement.

    python experiments/kernel_estimates.py

The model of the FP8 product is `estimated_cycles` of pallas_kernels/blockwise_matmul/tuning.py; besides, no product can
beat HBM, nor the clock that the chip keeps under a power limit. Quantisation is set against the copy bandwidth and
the issue slots that its arithmetic takes. Writes kernel_estimates.md into experiments/results/ (or --out);
experiments/benchmarks/kernels.py measures the same.
"""

from __future__ import annotations

import argparse
import pathlib

from pallas_kernels.blockwise_matmul.tuning import choose_tiling, estimated_cycles

RESULTS = pathlib.Path(__file__).parent / "results"
MULTIPROCESSORS = 132
CLOCK_GHZ = 1.755
PEAK_TFLOPS = 1979.0
# cuBLAS's bf16 product reaches 769 to 798 of 989 TFLOP/s on random data: the share of the peak that power allows.
SUSTAINED = 0.79
COPY_TB_PER_S = 4.3
LAYERS = ((7168, 2112), (1536, 24576), (512, 32768), (16384, 7168), (7168, 4096), (2048, 7168))
# Bytes moved and issue slots (of 128 lanes a cycle; minima, maxima and conversions run at half rate) an element.
QUANTISE = {
    "1x128, bfloat16": (3.03, 10),
    "128x128, bfloat16": (3.0, 13),
    "both orientations, bfloat16": (4.06, 21),
    "re-tiled, transposed": (2.06, 16),
}


def product(m: int, n: int, k: int) -> str:
    tiling = choose_tiling(m, n, k, 2, MULTIPROCESSORS)
    cycles = estimated_cycles(tiling, m, n, k, MULTIPROCESSORS)
    bound = max(cycles, key=cycles.__getitem__)
    flops = 2.0 * m * n * k
    microseconds = {
        bound: sum(cycles.values()) / CLOCK_GHZ * 1e-3,
        "HBM": (m * k + n * k + 2.0 * m * n) / COPY_TB_PER_S * 1e-6,
        "power": flops / (SUSTAINED * PEAK_TFLOPS) * 1e-6,
    }
    limit = max(microseconds, key=microseconds.__getitem__)
    tflops = flops / microseconds[limit] * 1e-6
    cut = f"{tiling.tile_m} x {tiling.tile_n}, cluster {tiling.cluster}, {tiling.stages} stages"
    share = f"{tflops / PEAK_TFLOPS:.0%}"
    return f"| {m} | {n} | {k} | {cut} | {limit} | {microseconds[limit]:.0f} | {tflops:,.0f} | {share} |"


def quantise(name: str) -> str:
    moved, slots = QUANTISE[name]
    memory = moved / (COPY_TB_PER_S * 1e12 / MULTIPROCESSORS / (CLOCK_GHZ * 1e9))
    arithmetic = slots / 128
    share = min(1.0, memory / arithmetic)
    return f"| {name} | {moved} | {slots} | {memory:.3f} | {arithmetic:.3f} | {share:.0%} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args()
    lines = [
        "# Where the kernels should land on an H200",
        "",
        "Counted by `experiments/kernel_estimates.py`, not measured; the model is explained there. It leaves out what",
        "only a run can show: bank conflicts, uneven L2 traffic, how well the two consumers' steps interlock.",
        "",
        "## FP8 product (operands quantised, bfloat16 out)",
        "",
        "| M | N | K | tile | bound by | microseconds | TFLOP/s | of peak |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *(product(m, n, k) for m in (64, 512, 4096, 8192) for k, n in LAYERS),
        "",
        "## Quantisation (cycles an element and multiprocessor)",
        "",
        "| kernel | bytes | issue slots | by memory | by issue | of the copy bandwidth at best |",
        "| --- | --- | --- | --- | --- | --- |",
        *(quantise(name) for name in QUANTISE),
        "",
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "kernel_estimates.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
