"""Draws a plan: what fills a device, where a step's time goes, and what a pipeline computes and sends at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from dsv3_jax.planning.compiled import CompiledPlan
from dsv3_jax.planning.overlap import Span
from dsv3_jax.planning.plan import Plan
from dsv3_jax.planning.report_table import memory_parts

_MEMORY_COLOURS = {
    "master weights": "#1f4e8c",
    "working weights": "#2f6db3",
    "gathered layers": "#9cc3e6",
    "gradients": "#d9822b",
    "moments of the optimizer": "#6fa8dc",
    "running average": "#4b86b4",
    "activations kept": "#7a5195",
    "one layer recomputed": "#b07cc6",
    "loss": "#cfa9dd",
    "reserved": "#bbbbbb",
}
_TIMES = {
    "fp8_products": ("FP8 products", "#1f4e8c"),
    "products": ("other products", "#2f6db3"),
    "attention": ("attention core", "#9cc3e6"),
    "memory": ("activations", "#7a5195"),
    "exchange": ("buffers of the exchange", "#374c80"),
    "optimizer": ("optimizer", "#b07cc6"),
    "exposed": ("communication not hidden", "#d9822b"),
    "bubble": ("pipeline bubble", "#bbbbbb"),
}


_PARTS = {
    "attention, forward": "#9cc3e6",
    "attention, backward": "#2f6db3",
    "routed experts, forward": "#cfa9dd",
    "routed experts, backward": "#7a5195",
}
_LANES = {"computation": 2, "between nodes": 1, "within a node": 0}


def draw_plan(plan: Plan, path: Path, compiled: CompiledPlan | None = None) -> None:
    """Writes a PNG of the plan, and below it of a pair of layers where the compiler's schedule has one."""
    config, pair = plan.config, compiled.pair if compiled else []
    # Not by pyplot, whose backend belongs to the program or notebook that imports this module.
    figure = Figure(figsize=(11, 8.2 if pair else 5.2), layout="constrained")
    if pair:
        axes = figure.subplot_mosaic([["memory", "time"], ["pair", "pair"]], height_ratios=[5, 3])
        left, right = axes["memory"], axes["time"]
        _draw_pair(axes["pair"], pair)
    else:
        left, right = figure.subplots(1, 2)
    mesh = ", ".join(f"{axis}={value}" for axis, value in vars(config.mesh).items() if value > 1) or "one device"
    billions = config.model.num_parameters(mtp=True) / 1e9
    figure.suptitle(f"{billions:.3g}B parameters on {config.target.name}: {mesh}")
    _draw_memory(left, plan)
    _draw_time(right, plan)
    figure.savefig(path, dpi=120)


def _draw_memory(axes: Axes, plan: Plan) -> None:
    unit, capacity = 2**30, plan.config.target.accelerator.memory
    bottom = 0.0
    for name, value in memory_parts(plan).items():
        label = f"{name}, {value / unit:.2f}"
        axes.bar(0, value / unit, bottom=bottom, color=_MEMORY_COLOURS[name], width=0.6, label=label)
        bottom += value / unit
    axes.axhline(capacity / unit, color="#b03030", linestyle="--", linewidth=1.2)
    axes.text(-0.48, capacity / unit, f"device: {capacity / unit:.0f}", color="#b03030", va="bottom", fontsize=9)
    axes.set(xlim=(-0.5, 1.75), ylim=(0, 1.12 * max(bottom, capacity / unit)), ylabel="GiB per device")
    axes.set_title("fits" if plan.fits else f"does not fit: {-plan.spare / unit:.1f} GiB too much")
    axes.set_xticks([])
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], frameon=False, loc="center right", fontsize=9, title="GiB")


def _draw_time(axes: Axes, plan: Plan) -> None:
    rows = {"at the peaks": plan.bound, "best kernels": plan.expected}
    for row, time in enumerate(rows.values()):
        start = 0.0
        for field, (label, colour) in _TIMES.items():
            value = getattr(time, field)
            if getattr(plan.bound, field) or getattr(plan.expected, field):
                axes.barh(row, value, left=start, color=colour, height=0.5, label=label if row == 0 else None)
            start += value
    like_report = plan.at_the_reports_pace
    axes.barh(2, like_report, color="#dddddd", height=0.5)
    axes.set_yticks([0, 1, 2], [*rows, "at the report's\npace"])
    totals = [plan.bound.total, plan.expected.total, like_report]
    for row, seconds in enumerate(totals):
        axes.text(seconds, row, f" {seconds:.3g} s, MFU {100 * plan.mfu(seconds):.0f}%", va="center", fontsize=9)
    axes.set(xlim=(0, 1.4 * max(totals)), ylim=(-0.5, 4.0), xlabel="seconds per step")
    axes.set_title(f"{plan.config.tokens_per_step:,} tokens per step")
    axes.legend(frameon=False, loc="upper right", fontsize=9, ncols=2)


def _draw_pair(axes: Axes, pair: Sequence[Span]) -> None:
    """Draws what a device computes, and what its links send meanwhile."""
    colours = [*_PARTS.items(), ("all else", "#bbbbbb")]
    for lane, row in _LANES.items():
        for part, colour in colours:
            spans = [span for span in pair if (span.lane, span.what) == (lane, part)]
            bars = [(1e3 * span.start, 1e3 * (span.end - span.start)) for span in spans]
            axes.broken_barh(bars, (row - 0.35, 0.7), color=colour if lane == "computation" else "#d9822b", lw=0)
    axes.legend(
        handles=[Patch(color=colour, label=part) for part, colour in (*colours, ("sending", "#d9822b"))],
        frameon=False,
        loc="upper center",
        ncols=3,
        fontsize=9,
    )
    axes.set_yticks([*_LANES.values()], [*_LANES])
    axes.set(ylim=(-0.5, 3.6), xlabel="milliseconds, by the roofline of each instruction of the compiler's schedule")
    axes.set_title("one layer forward and one backward, in a tick with both")
