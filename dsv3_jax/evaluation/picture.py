"""The picture of an evaluation by domain."""

from __future__ import annotations

import io

import numpy as np
from matplotlib.figure import Figure

from dsv3_jax.evaluation.by_domain import DomainResults
from dsv3_jax.evaluation.domain_drafts import DomainDrafts

_BLUE = "#2f6db3"


def draw_domains(results: DomainResults, drafts: DomainDrafts | None, title: str) -> bytes:
    """Returns a PNG: bits per byte by domain and position, experts that domains share, and accepted drafts."""
    panels = 3 if drafts is None else 4
    figure = Figure(figsize=(4.3 * panels, 4), layout="constrained")
    figure.suptitle(title)
    bars, line, shared, *accepted = figure.subplots(1, panels)
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
    if drafts is not None:
        firsts, shares = drafts.total.groups_of_positions()
        for depth, by_position in enumerate(shares.T, start=1):
            accepted[0].plot(np.maximum(firsts, 0.5), by_position, marker="o", label=f"depth {depth}")
        accepted[0].set_xscale("log", base=2)
        accepted[0].set(xlabel="position in the answer", ylabel="share of drafts accepted", ylim=(0, 1))
        accepted[0].legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
