"""The picture of an evaluation by domain."""

from __future__ import annotations

import io

import numpy as np
from matplotlib.figure import Figure

from dsv3_jax.evaluation.by_domain import DomainResults

_BLUE = "#2f6db3"


def draw_domains(results: DomainResults, title: str) -> bytes:
    """Returns a PNG: bits per byte of each domain and position, and the experts that each two domains share."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    figure.suptitle(title)
    bars, line, shared = figure.subplots(1, 3)
    places = np.arange(len(results.domains))
    bars.barh(places, results.bits_per_byte, color=_BLUE)
    bars.set_yticks(places, results.domains)
    bars.invert_yaxis()
    bars.set_xlabel("bits per byte")
    line.plot(np.maximum(results.positions, 0.5), results.by_position, color=_BLUE, marker="o")
    line.set_xscale("log", base=2)
    line.set_xlabel("position in the context")
    line.set_ylabel("bits per byte")
    image = shared.imshow(results.overlap, vmin=0, vmax=1, cmap="Blues")
    shared.set_xticks(places, results.domains, rotation=60, ha="right")
    shared.set_yticks(places, results.domains)
    figure.colorbar(image, ax=shared, label="share of experts in common")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
