"""Checks that a step on meshes of two or three axes, none of them stages, equals the step on one device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from simulated import run_simulated
from test_mesh_axes_alone import check_equal

_SCRIPT = Path(__file__).with_name("simulated_training.py")
MESHES = (
    "data=4,fsdp=2",
    "data=2,expert=4",
    "data=4,tensor=2",
    "fsdp=2,expert=4",
    "fsdp=4,tensor=2",
    "expert=4,tensor=2",
    "fsdp=2,expert=2,tensor=2",
)


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    return run_simulated(_SCRIPT, "small", *MESHES)


@pytest.mark.parametrize("mesh", MESHES)
def test_step_equals_one_device(results: dict[str, dict[str, Any]], mesh: str) -> None:
    check_equal(results[mesh])
