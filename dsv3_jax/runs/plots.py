"""Pictures of a run: the loss curves, and how evenly tokens are spread over experts."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from jaxtyping import Int
from matplotlib.figure import Figure

from dsv3_jax.runs.folder import write_atomically
from dsv3_jax.runs.metrics import Record

_BLUE, _ORANGE, _GREY = "#2f6db3", "#d9822b", "#888888"


def plot_losses(records: list[Record], path: Path, title: str) -> None:
    """Draws the training loss of the main and MTP heads, raw and smoothed, and the validation loss.

    Args:
      records: of metrics.jsonl.
      path: the PNG file to write.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
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
            joined = "o--" if steps.size > 2 else "o"  # no line between only two points
            axes.plot(steps, values, joined, color=colour, markersize=6, linewidth=1, label=label)
    axes.set(xlabel="step", ylabel="cross-entropy, nats per token", title=title)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    _save(figure, path)


def plot_rewards(records: list[Record], path: Path, title: str) -> None:
    """Draws reward and held-out accuracy, length, entropy, and the difference of engine and trainer over the steps.

    Args:
      records: of metrics.jsonl.
      path: the PNG file to write.
    """
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    panels = figure.subplots(2, 2).reshape(-1)
    curves = (("reward", "mean reward"), ("length", "tokens of a completion"), ("entropy", "entropy, nats per token"))
    for axes, (name, label) in zip(panels, (*curves, ("drawn_difference", "|engine - trainer|, nats")), strict=True):
        steps, values = _column(records, name)
        axes.plot(steps, values, color=_BLUE, alpha=0.3, linewidth=1)
        axes.plot(steps, _smooth(values), color=_BLUE, linewidth=1.8, label=label)
        axes.set(xlabel="step", ylabel=label)
        axes.grid(alpha=0.25)
    for axes, name, label in (
        (panels[0], "validation_accuracy", "held-out accuracy"),
        (panels[1], "validation_length", "held-out, most likely tokens"),
    ):
        axes.plot(*_column(records, name), "o--", color=_ORANGE, markersize=4, linewidth=1, label=label)
        axes.legend(frameon=False)
    figure.suptitle(title)
    _save(figure, path)


def plot_expert_load(
    records: list[Record], load: Int[np.ndarray, "layers E"], labels: list[str], path: Path, title: str
) -> None:
    """Draws the relative load of every expert at the end of the run, and MaxVio over the run.

    MaxVio is (tokens of the busiest expert / average) - 1, the mean over layers; 0 means perfectly balanced.

    Args:
      records: of metrics.jsonl.
      load: tokens sent to each expert, summed over the last steps.
      labels: names of the layers.
      path: the PNG file to write.
    """
    relative = load / np.maximum(load.mean(axis=1, keepdims=True), 1e-9)
    height = 1.4 + 0.34 * len(labels)
    figure = Figure(figsize=(9, height + 3.0), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=[height, 2.6])
    picture = top.imshow(relative, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2, interpolation="nearest")
    top.set(xlabel="expert", title=title)
    top.set_yticks(range(len(labels)), labels)
    figure.colorbar(picture, ax=top, label="tokens / average", pad=0.01)
    steps, values = _column(records, "max_violation")
    bottom.plot(steps, values, color=_GREY, alpha=0.3, linewidth=1)
    bottom.plot(steps, _smooth(values), color=_BLUE, linewidth=1.8)
    bottom.set(xlabel="step", ylabel="MaxVio")
    bottom.set_title("MaxVio: (busiest expert / average) - 1, mean over layers; 0 means balanced")
    bottom.set_ylim(bottom=0)
    bottom.grid(alpha=0.25)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    write_atomically(path, picture.getvalue())


def _column(records: list[Record], name: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(record["step"], float(record[name])) for record in records if name in record]
    pairs = [(step, value) for step, value in pairs if np.isfinite(value)]
    return np.array([step for step, _ in pairs]), np.array([value for _, value in pairs])


def _smooth(values: np.ndarray, decay: float = 0.9) -> np.ndarray:
    """Returns the exponential moving average, started at the first value."""
    smooth, last = np.empty_like(values), values[0] if values.size else 0.0
    for index, value in enumerate(values):
        last = decay * last + (1.0 - decay) * value
        smooth[index] = last
    return smooth
