"""Estimates the units in which the report serves the model, and the online service's, beside its published rates.

    python experiments/serving_units.py

Writes serving_units.json and serving_units.md into experiments/results/.
"""

from __future__ import annotations

import json
from pathlib import Path

from dsv3_jax import ModelConfig
from dsv3_jax.planning.hardware import Target
from dsv3_jax.planning.serving import Phase
from dsv3_jax.planning.serving_table import as_dict, lines, report_unit

UNITS: dict[str, tuple[Phase, str, int]] = {
    "Report, prefill": ("prefill", "h800:32", 4),
    "Report, decode": ("decode", "h800:320", 4),
    "Service of February 2025, prefill": ("prefill", "h800:32", 1),
    "Service of February 2025, decode": ("decode", "h800:144", 1),
}


def main() -> None:
    config, results = ModelConfig.preset("v3-671b"), Path(__file__).parent / "results"
    text, values = ["# Serving units", "", "Written by `experiments/serving_units.py`."], {}
    for name, (phase, target, tensor) in UNITS.items():
        unit = report_unit(phase, config, Target.parse(target), tensor=tensor)
        values[name] = as_dict(unit)
        text += ["", f"## {name}", "", "```", *lines(unit), "```"]
    (results / "serving_units.json").write_text(json.dumps(values, indent=1) + "\n")
    (results / "serving_units.md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
