"""Checks that a step on meshes in which each axis meets each other one, none of them stages, equals one device's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from simulated import run_simulated
from test_mesh_axes_alone import check_equal

_SCRIPT = Path(__file__).with_name("simulated_training.py")
MESHES = (
    "data=4,fsdp=2",
    "data=2,expert=2,tensor=2",
    "fsdp=2,expert=2,tensor=2",
)


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    return run_simulated(_SCRIPT, "with_mtp", *MESHES)


@pytest.mark.parametrize("mesh", MESHES)
def test_step_equals_one_device(results: dict[str, dict[str, Any]], mesh: str) -> None:
    check_equal(results[mesh])
