"""Estimates how fast the Hopper kernels should run on an H200, by counting cycles. Nothing is measured.

    python experiments/kernel_estimates.py

The cycles of an FP8 product come from `estimated_cycles` in pallas_kernels/blockwise_matmul/tuning.py, which says what
it counts and what it leaves out; a test compares it with the rates that DeepGEMM publishes. Those of the grouped
products come from `step_cycles` in pallas_kernels/grouped_matmul/tiling.py. Quantisation and routing are limited by the
copy bandwidth or by the issue slots of their arithmetic. Writes kernel_estimates.md into experiments/results/ (or
--out); experiments/device/run.py measures the same kernels.
"""

from __future__ import annotations

import pathlib

from command_line import CommandLine, folder

from pallas_kernels.blockwise_matmul.tuning import (
    CLOCK_GHZ,
    EPILOGUE_CYCLES,
    HBM_BYTES_PER_CYCLE,
    START_CYCLES,
    choose_tiling,
    estimated_cycles,
)
from pallas_kernels.grouped_matmul import tiling as grouped_tiling

RESULTS = pathlib.Path(__file__).parent / "results"
MULTIPROCESSORS = 132
PEAK_TFLOPS = 1979.0
COPY_TB_PER_S = HBM_BYTES_PER_CYCLE * CLOCK_GHZ * 1e-3
# (K, N) of V3's linear maps.
LAYERS = ((7168, 2112), (1536, 24576), (512, 32768), (16384, 7168), (7168, 4096), (2048, 7168))
# Bytes moved and issue slots, per element. 128 lanes issue per cycle; minima, maxima and conversions take two slots.
QUANTIZE = {
    "1x128, bfloat16": (3.03, 10),
    "128x128, bfloat16": (3.0, 13),
    "both orientations, bfloat16": (4.06, 21),
    "re-tiled, transposed": (2.06, 16),
}

EXPERTS = ((4096, 7168), (7168, 2048))  # (N, K) of an expert's gate-and-up projection and of its down projection
GROUPED_ROWS = 32768
TOKENS, WIDTH, CHOSEN, ALL_EXPERTS = 8192, 7168, 8, 256
# Issue slots per element moved: `combine` converts an element (1/2, as two share a slot) and multiplies and adds it
# (1); its gradient also scales and rounds one (3/2); `permute` leaves all work to TMA. Loads of 16 bytes add 1/8.
MOVES = {
    # elements read and written per token and column, issue slots per token
    "permute": (1 + CHOSEN, 0.0),
    "combine": (1 + CHOSEN, WIDTH * (CHOSEN * 1.625 + 1)),
    "gradient of combine": (1 + 2 * CHOSEN, WIDTH * (CHOSEN * 3.25 + 1)),
}
# Issue slots of the gate per token. For every candidate expert, one choice compares it and selects value, index and
# affinity (4), finds the lowest index among equals (2), extracts the affinity (2) and masks the chosen expert (2).
# There are two rounds of 8 choices, since the balance statistics need the choice without bias and groups. Computing the
# scores takes about 12, the group scores 10, the sums over the tile 12.
GATE_SLOTS = ALL_EXPERTS * (2 * CHOSEN * 10 + 34)


def product(m: int, n: int, k: int) -> str:
    """Returns the table row of one FP8 product [m, k] x [n, k]."""
    tiling = choose_tiling(m, n, k, 2, False, MULTIPROCESSORS)
    microseconds = {
        phase: cycles / CLOCK_GHZ * 1e-3
        for phase, cycles in estimated_cycles(tiling, m, n, k, 2, False, MULTIPROCESSORS).items()
    }
    total = sum(microseconds.values())
    phases = ", ".join(f"{phase} {time:.1f}" for phase, time in microseconds.items())
    tflops = 2e-6 * m * n * k / total
    return (
        f"| {m} | {n} | {k} | {tiling.words()} | {phases} | {total:.1f} | {tflops:,.0f} | {tflops / PEAK_TFLOPS:.0%} |"
    )


def quantize(name: str) -> str:
    """Returns the table row of one quantisation kernel."""
    moved, slots = QUANTIZE[name]
    memory = moved / (COPY_TB_PER_S * 1e12 / MULTIPROCESSORS / (CLOCK_GHZ * 1e9))
    arithmetic = slots / 128
    share = min(1.0, memory / arithmetic)
    return f"| {name} | {moved} | {slots} | {memory:.3f} | {arithmetic:.3f} | {share:.0%} |"


def grouped(groups: int, n: int, k: int, depth: bool) -> str:
    """Returns the table row of a grouped product: [rows, n] in bfloat16, or with `depth` the float32 weight gradient
    [groups, n, k]."""
    columns, contraction = (k, GROUPED_ROWS) if depth else (n, k)
    along = "depth" if depth else "rows"
    out_bytes = 4 if depth else 2
    tiling = grouped_tiling.choose_tiling(along, columns, contraction, groups, True, out_bytes)
    step = grouped_tiling.step_cycles(tiling, along, True)
    bound = max(step, key=step.__getitem__)
    row_tiles = groups * -(-n // 128) if depth else GROUPED_ROWS // 128
    steps = -(-(GROUPED_ROWS // groups if depth else k) // 128)
    tiles = row_tiles * -(-columns // (tiling.tile_n * tiling.cluster))
    rounds = -(-tiles // (MULTIPROCESSORS // tiling.cluster))
    flops = 2.0 * GROUPED_ROWS * n * k
    read = GROUPED_ROWS * (n + k) if depth else GROUPED_ROWS * k + groups * n * k
    written = 4.0 * groups * n * k if depth else 2.0 * GROUPED_ROWS * n
    main = rounds * steps * step[bound]
    if read / HBM_BYTES_PER_CYCLE > main:
        bound, main = "HBM", read / HBM_BYTES_PER_CYCLE
    writing = rounds * EPILOGUE_CYCLES + written / HBM_BYTES_PER_CYCLE
    total = (START_CYCLES + main + writing) / CLOCK_GHZ * 1e-3
    phases = f"{bound} {main / CLOCK_GHZ * 1e-3:.0f}, writing {writing / CLOCK_GHZ * 1e-3:.0f}"
    tflops = flops / total * 1e-6
    form = "weight gradient" if depth else "rows"
    cut = f"128 x {tiling.tile_n}, cluster {tiling.cluster}, {tiling.stages} stages"
    against = "" if depth else f"{tflops / _dense_tflops(GROUPED_ROWS, n, k):.0%}"
    return (
        f"| {form} | {groups} | {n} | {k} | {cut} | {phases} | {total:,.0f} | {tflops:,.0f} | "
        f"{tflops / PEAK_TFLOPS:.0%} | {against} |"
    )


def _dense_tflops(m: int, n: int, k: int) -> float:
    """Returns the estimated rate of one dense FP8 product."""
    tiling = choose_tiling(m, n, k, 2, False, MULTIPROCESSORS)
    cycles = sum(estimated_cycles(tiling, m, n, k, 2, False, MULTIPROCESSORS).values())
    return 2.0 * m * n * k / cycles * CLOCK_GHZ * 1e-3


def routed(name: str, moved: float, slots: float) -> str:
    """Returns the table row of a routing kernel from the bytes and issue slots of all tokens together."""
    microseconds = {
        "HBM": moved / COPY_TB_PER_S * 1e-6,
        "issue": slots / 128 / MULTIPROCESSORS / CLOCK_GHZ * 1e-3,
    }
    limit = max(microseconds, key=microseconds.__getitem__)
    share = microseconds["HBM"] / microseconds[limit]
    times = " | ".join(f"{microseconds[key]:.1f}" for key in ("HBM", "issue"))
    return f"| {name} | {moved / 1e6:,.0f} | {times} | {limit} | {share:.0%} |"


def routing() -> list[str]:
    """Returns the table rows of the routing kernels."""
    moves = [
        routed(f"{name}, {TOKENS} x {WIDTH}", 2.0 * TOKENS * WIDTH * elements, TOKENS * slots)
        for name, (elements, slots) in MOVES.items()
    ]
    gate_bytes = 4.0 * TOKENS * ALL_EXPERTS + 8.0 * TOKENS * CHOSEN
    return [*moves, routed(f"gate, {TOKENS} x {ALL_EXPERTS}", gate_bytes, TOKENS * GATE_SLOTS)]


def main() -> None:
    parser = CommandLine(__doc__)
    parser.add_argument("--out", type=folder, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    lines = [
        "# Estimated speed of the kernels on an H200",
        "",
        "Computed by `experiments/kernel_estimates.py`, which explains the model; not measured. The estimates ignore",
        "what only a run can show: bank conflicts, uneven L2 traffic, how well the steps of the two consumers overlap.",
        "",
        "## FP8 product (operands quantised, bfloat16 out)",
        "",
        "| M | N | K | tile | microseconds by phase | in all | TFLOP/s | of peak |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *(product(m, n, k) for m in (1, 64, 128, 512, 4096, 8192) for k, n in LAYERS),
        "",
        "## Quantisation (cycles per element on one multiprocessor)",
        "",
        "| kernel | bytes | issue slots | by memory | by issue | share of the copy bandwidth at best |",
        "| --- | --- | --- | --- | --- | --- |",
        *(quantize(name) for name in QUANTIZE),
        "",
        f"## Grouped FP8 products ({GROUPED_ROWS:,} rows in all)",
        "",
        "A product with groups along the rows costs the same however the rows are distributed over the groups, because",
        "a tile never holds two groups. Weight gradients are written in float32; with many groups, writing takes all",
        "the time. Their estimate assumes groups of equal size; few multiprocessors would compute the last tiles of",
        "one long group.",
        "",
        "| form | groups | N | K | tile | microseconds by phase | in all | TFLOP/s | of peak | of dense, same rows |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        *(grouped(g, n, k, depth) for depth in (False, True) for n, k in EXPERTS for g in (8, 32, 256)),
        "",
        "In the dense product two blocks share the weight tile, 192 of 320 rows and columns. In a grouped product they",
        "can share only the 128 rows, because the next block along the rows may belong to another group.",
        "",
        "## Routing",
        "",
        "| kernel | megabytes | microseconds by HBM | by issue | bound by | share of the copy bandwidth at best |",
        "| --- | --- | --- | --- | --- | --- |",
        *routing(),
        "",
        "The gate moves few bytes but makes many comparisons: it chooses 8 of 256 candidates, twice.",
        "",
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "kernel_estimates.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
