"""Axes of the mesh together, every two of them in some mesh: the step equals the step on one device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from simulated import run_simulated
from test_mesh_axes_alone import check_equal

_SCRIPT = Path(__file__).with_name("simulated_training.py")
MESHES = ("data=2,fsdp=2,expert=2", "fsdp=2,expert=2,tensor=2", "data=2,tensor=2")


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    return run_simulated(_SCRIPT, "small", *MESHES)


@pytest.mark.parametrize("mesh", MESHES)
def test_step_equals_one_device(results: dict[str, dict[str, Any]], mesh: str) -> None:
    check_equal(results[mesh])


def test_stages_divide_parameters_and_moments() -> None:
    """Beside data and expert; `tests/pipeline` has stages beside fsdp and tensor, and says more of the pipeline."""
    (found,) = run_simulated(_SCRIPT, "staged", "stage=2,data=2,expert=2").values()
    check_equal(found)
    assert found["parameters"] < 0.6
    assert found["moments"] < 0.4
