"""Draws the pipeline schedules like figure 5 of the report, and tabulates what they cost like its table 2.

    python experiments/pipeline_schedules.py [--ranks 8] [--micro-batches 20] [--output experiments/results/...]

The times are F = 1, B = 2 (of which W = 1) and F&B = 3. Every number comes from simulating the schedule.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import matplotlib.pyplot as plt
from command_line import CommandLine, folder, whole_number

from dsv3_jax.errors import UserError
from dsv3_jax.pipeline.schedules import ScheduleName, make_schedule
from dsv3_jax.pipeline.simulation import (
    Durations,
    Timed,
    label,
    published_bubble,
    schedule_figures,
    simulate,
    text_picture,
)

TITLES: dict[ScheduleName, str] = {"1f1b": "1F1B", "zb1p": "ZB1P", "dualpipe": "DualPipe"}
COLOURS = {"F": "#f6b26b", "B": "#6aa84f", "I": "#b6d7a8", "W": "#6fa8dc"}
NAMES = {"F": "forward", "B": "backward", "I": "backward for input", "W": "backward for weights"}


def main(argv: list[str] | None = None) -> None:
    parser = CommandLine(__doc__)
    parser.add_argument("--ranks", type=whole_number(1), default=8)
    parser.add_argument("--micro-batches", type=whole_number(1), default=20)
    parser.add_argument("--output", type=folder, default=Path(__file__).parent / "results" / "pipeline_schedules")
    options = parser.parse_args(argv)
    durations = Durations()
    try:
        schedules = {name: make_schedule(name, options.ranks, options.micro_batches) for name in TITLES}
    except UserError as error:
        parser.error(str(error))
    options.output.mkdir(parents=True, exist_ok=True)
    figure, panels = plt.subplots(3, 1, figsize=(20, 11), sharex=True, layout="constrained")
    rows, text = {}, []
    for panel, (name, title) in zip(panels, TITLES.items(), strict=True):
        timeline = simulate(schedules[name], durations.of)
        figures = schedule_figures(name, options.ranks, options.micro_batches, durations)
        rows[name] = dataclasses.asdict(figures) | {
            "published_bubble": published_bubble(name, options.ranks, durations)
        }
        heading = (
            f"{title}: bubble {figures.bubble:g} of {figures.total:g}, parameters {figures.parameter_copies}x, "
            f"activations of {figures.activations} micro-batches"
        )
        print(heading)
        text += [heading, text_picture(timeline), ""]
        panel.set_title(heading, loc="left")
        panel.set_yticks(range(options.ranks), [f"rank {rank}" for rank in range(options.ranks)])
        panel.set_ylim(options.ranks - 0.5, -0.5)
        for rank, actions in enumerate(timeline.ranks):
            for timed in actions:
                draw(panel, rank, timed)
    panels[-1].set_xlim(0, max(row["total"] for row in rows.values()))
    panels[-1].set_xlabel("time, forward passes of one micro-batch on one stage")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    figure.legend(handles, NAMES.values(), loc="outside lower center", ncols=4)
    figure.savefig(options.output / "pipeline_schedules.png", dpi=80)
    (options.output / "pipeline_schedules.json").write_text(json.dumps(rows, indent=2) + "\n")
    (options.output / "pipeline_schedules.txt").write_text("\n".join(text))


def draw(panel: plt.Axes, rank: int, timed: Timed) -> None:
    """Draws an action as a box; an overlapped pair as two boxes, the forward pass above."""
    name = label(timed.action)
    halves = [name[: name.index("B")], name[name.index("B") :]] if name[0] == "F" and "B" in name else [name]
    for at, half in enumerate(halves):
        height = 0.9 / len(halves)
        top = rank - 0.45 + at * height
        width = timed.end - timed.start
        box = plt.Rectangle((timed.start, top), width, height, facecolor=COLOURS[half[0]], edgecolor="white")
        panel.add_patch(box)
        panel.text(timed.start + width / 2, top + height / 2, half[1:], ha="center", va="center", fontsize=7)


if __name__ == "__main__":
    main()
