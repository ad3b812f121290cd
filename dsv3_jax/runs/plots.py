"""Pictures of a run: the loss curves, and how evenly the experts are used."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np

from dsv3_jax.runs.metrics import Record

matplotlib.use("Agg")
from matplotlib import pyplot as plt

_BLUE, _ORANGE, _GREY = "#2f6db3", "#d9822b", "#888888"


def plot_losses(records: list[Record], path: Path, title: str) -> None:
    """Training loss of the main and MTP heads, smoothed over the raw curve, and validation loss where measured."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name, label, colour in (("main_loss", "main head", _BLUE), ("mtp_loss", "MTP head", _ORANGE)):
        steps, values = _column(records, name)
        if steps.size:
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
            axes.plot(steps, _smooth(values), color=colour, linewidth=1.8, label=f"{label}, training")
    for name, label, colour in (
        ("validation_loss", "main head, validation", _BLUE),
        ("validation_mtp_loss", "MTP head, validation", _ORANGE),
    ):
        steps, values = _column(records, name)
        if steps.size:
            joined = "o--" if steps.size > 2 else "o"  # a line between start and end would be no curve
            axes.plot(steps, values, joined, color=colour, markersize=6, linewidth=1, label=label)
    axes.set(xlabel="step", ylabel="cross-entropy, nats a token", title=title)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_expert_load(records: list[Record], load: np.ndarray, labels: list[str], path: Path, title: str) -> None:
    """Relative load of every expert and layer at the end, and MaxVio over the run.

    Args:
      load: [layers, E] assignments, summed over the last steps.
      labels: names of the layers.
    """
    relative = load / np.maximum(load.mean(axis=1, keepdims=True), 1e-9)
    height = 1.4 + 0.34 * len(labels)
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(9, height + 3.0), height_ratios=[height, 2.6], layout="constrained"
    )
    picture = top.imshow(relative, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2, interpolation="nearest")
    top.set(xlabel="expert", title=title)
    top.set_yticks(range(len(labels)), labels)
    figure.colorbar(picture, ax=top, label="load over mean", pad=0.01)
    steps, values = _column(records, "max_violation")
    bottom.plot(steps, values, color=_GREY, alpha=0.3, linewidth=1)
    bottom.plot(steps, _smooth(values), color=_BLUE, linewidth=1.8)
    bottom.set(xlabel="step", ylabel="MaxVio, mean of layers", title="largest load over the mean, less one (0 is even)")
    bottom.set_ylim(bottom=0)
    bottom.grid(alpha=0.25)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _column(records: list[Record], name: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(record["step"], float(record[name])) for record in records if name in record]
    pairs = [(step, value) for step, value in pairs if np.isfinite(value)]
    return np.array([step for step, _ in pairs]), np.array([value for _, value in pairs])


def _smooth(values: np.ndarray, decay: float = 0.9) -> np.ndarray:
    """Exponential moving average, started at the first value."""
    smooth, last = np.empty_like(values), values[0] if values.size else 0.0
    for index, value in enumerate(values):
        last = decay * last + (1.0 - decay) * value
        smooth[index] = last
    return smooth
