"""Measures the error of FP8 dot products summed as Hopper's tensor cores sum (report, section 3.3.2).

    python experiments/fp8_numerics.py

Claim: because the tensor core keeps only about 14 bits of a sum, long sums are off by about 2%; promotion corrects
this. The tensor core is emulated. One wgmma instruction adds 32 products to its accumulator: it aligns all 33 terms
to the largest of them and truncates each below the 13th bit after the leading bit of the largest (14 bits in all).
Promotion adds that accumulator to a float32 total every 128 products and resets it. The reference is computed in
float64 from the same e4m3 operands, so that only the error of the summation is measured. The error of rounding the
operands to e4m3 is reported with it for comparison.

Writes fp8_numerics.json and fp8_numerics.png into experiments/results/ (or --out).
"""

from __future__ import annotations

import json
import pathlib

import jax.numpy as jnp
import numpy as np
from command_line import CommandLine, folder, whole_number
from matplotlib.figure import Figure

import pallas_kernels as pk

RESULTS = pathlib.Path(__file__).parent / "results"
STEP = 32  # products that one wgmma instruction adds along K
KEPT_BITS = 14


def tensor_core_sum(products: np.ndarray, interval: int | None, bits: int = KEPT_BITS) -> np.ndarray:
    """Returns the float32 sum of products [K, ...] over K, computed as the tensor core does.

    Args:
      products: float64, each exact.
      interval: number of products after which the accumulator is added to a float32 total and reset; None for never.
      bits: bits kept of each term, counted from the leading bit of the largest term.
    """
    total = np.zeros(products.shape[1:], np.float32)
    accumulator = np.zeros(products.shape[1:])
    for start in range(0, len(products), STEP):
        terms = np.concatenate([accumulator[None], products[start : start + STEP]])
        largest = np.abs(terms).max(axis=0)
        _, exponent = np.frexp(largest)
        unit = np.ldexp(1.0, exponent - bits)
        accumulator = np.trunc(terms / unit).sum(axis=0) * unit
        if interval and (start + STEP) % interval == 0:
            total += accumulator.astype(np.float32)
            accumulator = np.zeros_like(accumulator)
    return total + accumulator.astype(np.float32)


def measure(k: int, distribution: str, outputs: int, seed: int) -> dict[str, float]:
    """Returns the largest and the root-mean-square relative error of `outputs` random dot products of length `k`.

    Args:
      distribution: "normal", or "uniform" in [0, 1).
    """
    rng = np.random.default_rng(seed)
    draw = {"normal": lambda: rng.normal(size=(outputs, k)), "uniform": lambda: rng.uniform(size=(outputs, k))}
    x, w = draw[distribution](), draw[distribution]()
    a, b = (np.asarray(pk.quantize(jnp.asarray(v, jnp.float32), tile="1x128").values, "f8") for v in (x, w))
    exact = (a * b).sum(axis=1)
    restored = [np.asarray(pk.dequantize(pk.quantize(jnp.asarray(v, jnp.float32), tile="1x128")), "f8") for v in (x, w)]
    # Sums of positive numbers are compared with the exact sum, sums of signed numbers (some near zero) with their rms.
    scale = np.abs(exact) if distribution == "uniform" else np.sqrt(np.mean(exact**2))
    plain = (x * w).sum(axis=1)
    plain_scale = np.abs(plain) if distribution == "uniform" else np.sqrt(np.mean(plain**2))
    products = (a * b).T
    errors = {
        "without promotion": (tensor_core_sum(products, None) - exact) / scale,
        "promoted every 128": (tensor_core_sum(products, pk.PROMOTION_INTERVAL) - exact) / scale,
        "float32 accumulation": (products.astype(np.float32).cumsum(axis=0, dtype=np.float32)[-1] - exact) / scale,
        "rounding to e4m3": ((restored[0] * restored[1]).sum(axis=1) - plain) / plain_scale,
    }
    return {
        f"{name}, {kind}": float(value)
        for name, error in errors.items()
        for kind, value in (("max", np.abs(error).max()), ("rms", np.sqrt(np.mean(error**2))))
    }


def plot(rows: list[dict], path: pathlib.Path) -> None:
    """Draws the largest relative error over K, one panel for each distribution."""
    figure = Figure(figsize=(10, 4), layout="tight")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, distribution in zip(axes, ("uniform", "normal"), strict=True):
        chosen = [row for row in rows if row["distribution"] == distribution]
        for name in ("without promotion", "promoted every 128", "float32 accumulation", "rounding to e4m3"):
            axis.loglog([row["K"] for row in chosen], [row[f"{name}, max"] for row in chosen], marker="o", label=name)
        axis.set_xlabel("K, length of the sum")
        axis.set_xscale("log", base=2)
        axis.set_title({"uniform": "operands in [0, 1)", "normal": "normal operands"}[distribution])
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("largest relative error")
    axes[1].legend(loc="center", bbox_to_anchor=(0.5, 0.37))
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = CommandLine(__doc__)
    parser.add_argument(
        "--lengths",
        type=whole_number(1),
        nargs="+",
        default=[512, 1024, 2048, 4096, 8192, 16384],
        help="lengths K of the dot products (default: %(default)s)",
    )
    parser.add_argument(
        "--outputs", type=whole_number(1), default=1024, help="dot products per length (default: %(default)s)"
    )
    parser.add_argument("--out", type=folder, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    rows = [
        {"K": k, "distribution": distribution, **measure(k, distribution, options.outputs, seed=k)}
        for distribution in ("uniform", "normal")
        for k in options.lengths
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "fp8_numerics.json").write_text(json.dumps(rows, indent=1) + "\n")
    plot(rows, options.out / "fp8_numerics.png")
    for row in rows:
        print(f"{row['distribution']:8} K={row['K']:6}", {n: f"{v:.2e}" for n, v in row.items() if n.endswith("max")})


if __name__ == "__main__":
    main()
