"""Experts on several devices equal to one: on a mesh, and inside the stages of a pipeline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TOLERANCE = 1e-5  # of float32 sums in another order


def on_eight_devices(script: str) -> dict[str, Any]:
    """What the script beside this file prints."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(script))],
        capture_output=True,
        text=True,
        env=os.environ | flags | {"PYTHONPATH": str(Path(__file__).parents[2])},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_experts_on_eight_devices_equal_one() -> None:
    """Output, load and every gradient: up to the order of float32 sums, which the load must not feel at all."""
    results = on_eight_devices("simulated_experts.py")
    assert len(results) == 2
    for mesh, found in results.items():
        assert found["load"], mesh
        assert found["uneven"] > 1.5
        assert found["output"] < TOLERANCE, mesh
        assert found["gradient"] < TOLERANCE, mesh


def test_experts_inside_the_stages_of_a_pipeline() -> None:
    """Each stage its own branch, with exchanges in different numbers: nobody waits for another stage."""
    found = on_eight_devices("simulated_stage_experts.py")
    assert found["load"]
    assert found["output"] < TOLERANCE
    assert found["gradient"] < TOLERANCE
